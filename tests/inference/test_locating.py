"""Where in a prompt's tokens the caller's texts lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.servicers.locating import Unlocated, locate
from services.pretrained.control import Control
from services.pretrained.templates import JinjaTemplate, Message, PlainTemplate
from services.pretrained.tokenizer import Tokenizer
from tests.inference.vocabularies import KINDS

TOKENIZERS = {name: Tokenizer(make()) for name, make in KINDS.items()}
SOURCE = "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}<turn>model\n"
TEXTS = st.text(alphabet=st.sampled_from("ab ,\n世é:T"), max_size=12)


def covered(located, tokenizer, place, text):
    """The bytes of a text that its tokens say they cover."""
    data = text.encode()
    return b"".join(data[first:last] for first, last in dict.fromkeys((first, last) for _, first, last in located.texts[place]))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_tokens_cover_the_text_and_nothing_else_of_the_prompt(kind, text):
    tokenizer = TOKENIZERS[kind]

    def render(texts):
        return [*map(Control, tokenizer.prefix), f"Text: {texts[0]}\nCategory:"]

    located = locate(tokenizer, render, [text])
    assert list(located.ids) == tokenizer.encode_parts(render([text]))
    assert covered(located, tokenizer, 0, text) == text.encode()
    places = [place for place, _, _ in located.texts[0]]
    assert places == sorted(set(places)) and len(places) < len(located.ids)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_turns_are_found_through_templates(kind, texts):
    tokenizer = TOKENIZERS[kind]
    jinja = JinjaTemplate(SOURCE, tokenizer, (("bos_token", "<bos>"),))
    for template in (jinja, PlainTemplate(tuple(tokenizer.prefix))):

        def render(texts, template=template):
            return template.render([Message("user", text) for text in texts])

        located = locate(tokenizer, render, texts)
        assert list(located.ids) == tokenizer.encode_parts(render(texts))
        for place, text in enumerate(texts):
            said = text.encode() if template is jinja else text.strip().encode()
            assert covered(located, tokenizer, place, text) == said


@pytest.mark.parametrize(
    "render",
    [
        lambda texts: [f"{texts[0]} and {texts[0]}"],  # twice
        lambda texts: ["nothing of it"],
        lambda texts: [texts[0].upper()],
        lambda texts: [Control(3) if texts[0] == "a" else Control(4), texts[0]],
    ],
)
def test_a_form_that_hides_its_text_is_refused(render):
    with pytest.raises(Unlocated):
        locate(TOKENIZERS["byte-level"], render, ["a"])
