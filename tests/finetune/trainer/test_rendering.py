import json

import pytest

from services.finetune.rows import Turn
from services.finetune.trainer.rendering import Renderer
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer
from tests.inference.vocabularies import byte_fallback

TURNS = (Turn("user", "hello <eos>"), Turn("assistant", "yes"), Turn("user", "world"), Turn("assistant", "no"))
KEPT = "<bos>{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
KEPT += "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
FORGETS = KEPT.replace("{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}the{% endif %}")


def renderer(tmp_path, template=None, ends=("<eos>", "</turn>")):
    (tmp_path / "tokenizer.json").write_text(byte_fallback())
    if template:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    return Renderer.of(tokenizer, load_template(tmp_path, tokenizer, tokenizer.prefix), [tokenizer.control[end] for end in ends])


def spoken(own, example):
    return [own.tokenizer.decode(example.ids[begin:end]) for begin, end in example.spans]


def test_supervised_are_the_assistants_words_and_what_ends_them(tmp_path):
    own = renderer(tmp_path, KEPT)
    (example,) = own.chat(TURNS)
    assert own.end == own.tokenizer.control["</turn>"] and spoken(own, example) == ["yes", "no"]
    assert all(example.ids[end - 1] == own.end for _, end in example.spans)
    assert example.ids[-1] == own.end


def test_what_a_replica_would_be_asked_is_what_stands_before_the_answer(tmp_path):
    own = renderer(tmp_path, KEPT)
    (example,) = own.chat(TURNS)
    begin, _ = example.spans[-1]
    asked = own.tokenizer.encode_parts(own.template.render([*_messages(TURNS[:-1])]))
    assert list(example.ids[:begin]) == asked


def _messages(turns):
    from services.pretrained.templates import Message

    return [Message(turn.role, turn.content) for turn in turns]


def test_V10_a_control_tokens_spelling_in_a_row_is_plain_text(tmp_path):
    own = renderer(tmp_path, KEPT)
    (example,) = own.chat(TURNS)
    assert own.tokenizer.control["<eos>"] not in example.ids


def test_a_turn_that_the_template_repeats_otherwise_is_an_example_of_its_own(tmp_path):
    own = renderer(tmp_path, FORGETS)
    first, second = own.chat(TURNS)
    assert spoken(own, first) == ["yes"] and spoken(own, second) == ["no"]


def test_the_plain_template_answers_after_a_blank_and_ends_with_the_end_token(tmp_path):
    own = renderer(tmp_path, ends=("<eos>",))
    (example,) = own.chat(TURNS)
    assert spoken(own, example) == [" yes", " no"] and example.ids[-1] == own.tokenizer.control["<eos>"]


def test_a_base_without_an_end_cannot_learn_to_stop(tmp_path):
    with pytest.raises(ValueError, match="ends"):
        renderer(tmp_path, ends=())


def test_a_labelled_text_is_the_prefix_and_plain_ids(tmp_path):
    own = renderer(tmp_path, KEPT)
    example = own.labelled("hello <turn>", 3)
    assert example.label == 3 and not example.spans
    assert list(example.ids) == [*own.tokenizer.prefix, *own.tokenizer.encode("hello <turn>")]
    assert own.tokenizer.control["<turn>"] not in example.ids
