"""V9: tokens of rows as a base would see them."""

from pathlib import Path

from services.finetune.rows import Row, Turn
from services.finetune.token_counts import counters
from services.pretrained.tokenizer import Tokenizer
from tests.inference.vocabularies import byte_fallback


def base(folder: Path, name: str = "tiny", template: str = "") -> tuple[str, Path]:
    directory = folder / name
    directory.mkdir()
    (directory / "tokenizer.json").write_text(byte_fallback())
    if template:
        (directory / "chat_template.jinja").write_text(template)
    return f"models/{name}", directory


def test_V9_a_text_costs_its_prefix_and_its_ids(tmp_path: Path) -> None:
    (counter,) = counters([base(tmp_path)])
    tokenizer = Tokenizer(byte_fallback())
    assert counter.base_model == "models/tiny"
    texts = ["hello", "", "<bos> hello"]
    assert counter.count([Row(1, 0, 1, text=text) for text in texts]) == [1 + len(tokenizer.encode(text)) for text in texts]


def test_V9_a_chat_costs_its_template_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    )
    (counter,) = counters([base(tmp_path, template=template)])
    tokenizer = Tokenizer(byte_fallback())
    said = (Turn("user", "hi"), Turn("assistant", "hello"))
    (chat, refused, preference) = counter.count(
        [
            Row(1, 0, 1, messages=said),
            Row(1, 0, 1, messages=(Turn("tool", "hi"), Turn("assistant", "hello"))),
            Row(1, 0, 1, prompt="hi", chosen="hello", rejected="h"),
        ]
    )
    assert chat == preference == len(tokenizer.encode("[user]hi[assistant]hello"))
    assert refused == len(tokenizer.encode("hi")) + len(tokenizer.encode("hello"))


def test_a_base_without_a_tokenizer_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    name, directory = base(tmp_path, "broken")
    (directory / "tokenizer.json").write_text("{}")
    assert [counter.base_model for counter in counters([("models/none", tmp_path / "none"), (name, directory), base(tmp_path)])] == [
        "models/tiny"
    ]
