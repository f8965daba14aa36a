"""What is told of rows that stand on both sides, nearly."""

from services.finetune.trainer.control import Warned
from services.finetune.trainer.grants import near_overlap
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.rows import prepare
from services.finetune.trainer.spec import Method, Privacy
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer
from tests.finetune.trainer import world

LONG = (
    "The quick brown fox jumps over the lazy dog while seven wise wizards watch from a hill in the evening and say nothing at all about it"
)


def rows(*texts):
    return "".join(f'{{"text": "{text}", "label": "{("tech", "sport")[at % 2]}"}}\n' for at, text in enumerate(texts)).encode()


def prepared(tiny_base, tmp_path, train, held, **changed):
    plane = world.plane(Method.CLASSIFY, f"file://{tmp_path}/store", data=train, validation=held, **changed)
    tokenizer = Tokenizer.from_directory(tiny_base)
    template = load_template(tiny_base, tokenizer, tokenizer.prefix)
    return prepare(plane.objects, plane.claim(), Renderer.of(tokenizer, template, (1,)))


def test_V12_near_rows_of_a_validation_version_are_told_by_line_and_count(tiny_base, tmp_path):
    train, held = rows(LONG, "something else entirely"), rows("a third thing here", LONG + " now", LONG + " then")
    found = prepared(tiny_base, tmp_path, train, held, seq_len=2048)
    assert Warned("V12.near_rows", 2, 2) in found.warnings
    assert len(found.validation) == 3, "a warning leaves nothing out"


def test_V12_near_rows_of_a_split_are_told_too(tiny_base, tmp_path):
    texts = [f"{LONG} {at}" for at in range(20)]
    found = prepared(tiny_base, tmp_path, rows(*texts), None, seq_len=2048)
    (told,) = [each for each in found.warnings if each.rule == "V12.near_rows"]
    assert told.count == len(found.validation) > 0


def test_V12_rows_apart_are_not_warned_of_and_a_private_run_tells_nothing(tiny_base, tmp_path):
    apart = prepared(tiny_base, tmp_path, rows(LONG, "something else entirely"), rows("a third thing here"))
    assert not [each for each in apart.warnings if each.rule.startswith("V12")]
    private = prepared(tiny_base, tmp_path, rows(LONG, "else"), rows(LONG + " now"), privacy=Privacy(8.0, 1e-5))
    assert not [each for each in private.warnings if each.rule.startswith("V12")]


def test_nothing_to_measure_on_is_nothing_near():
    assert near_overlap([], []) is None
