import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.inference.text import Utf8Stream
from services.pretrained.control import Control
from services.pretrained.tokenizer import Tokenizer, TokenizerUnsupported
from tests.inference.vocabularies import CONTROL, KINDS, PLACEHOLDER

TOKENIZERS = {name: Tokenizer(build()) for name, build in KINDS.items()}
kinds = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
# Every text a caller may send: no lone surrogates (they are not UTF-8); control spellings mixed in.
SPELLED = st.sampled_from([*CONTROL, PLACEHOLDER, " ", "\n\n", "<0x41>", "世界", "𓀀", "<unk>"])
TEXTS = st.lists(st.one_of(SPELLED, st.text(max_size=8))).map("".join)


@kinds
@given(text=TEXTS)
def test_A19_spelled_control_tokens_stay_plain_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.control.values())
    assert tokenizer.decode(ids) == text


@kinds
@given(text=TEXTS)
def test_spans_cover_text(tokenizer, text):
    data, at = text.encode(), 0
    for piece in tokenizer.pieces(text):
        covered = data[piece.start_byte : piece.end_byte].decode()  # on character borders, or this raises
        assert piece.start_byte == at or (len(covered) == 1 and piece.end_byte == at)  # else a part of the same character
        at = piece.end_byte
    assert at == len(data)
    assert [piece.id for piece in tokenizer.pieces(text)] == tokenizer.encode(text)


@kinds
@given(text=TEXTS)
def test_tokens_stream_back_to_the_same_text(tokenizer, text):
    stream = Utf8Stream()
    assert "".join(stream.feed(tokenizer.text_bytes(token)) for token in tokenizer.encode(text)) + stream.finish() == text


@kinds
def test_generated_control_tokens_add_no_text(tokenizer):
    turn, image = tokenizer.control["</turn>"], tokenizer.control[PLACEHOLDER]
    assert tokenizer.decode([*tokenizer.encode("yes"), turn]) == "yes"
    assert tokenizer.token_bytes(turn) == b"</turn>"
    assert tokenizer.decode([image]) == PLACEHOLDER  # not special: a model that writes it means its spelling


@kinds
def test_template_text_gives_control_ids_and_one_run_of_text(tokenizer):
    parts = [*tokenizer.split_control("<bos><turn>yes\n"), "<turn> no", *tokenizer.split_control("</turn>")]
    ids = tokenizer.encode_parts(parts)
    control = tokenizer.control
    assert ids == [control["<bos>"], control["<turn>"], *tokenizer.encode("yes\n<turn> no"), control["</turn>"]]
    assert tokenizer.split_control("plain") == ["plain"]
    assert tokenizer.split_control("") == []
    assert tokenizer.split_control("<eos>") == [Control(control["<eos>"])]


@kinds
def test_prefix_is_what_the_model_expects_before_text(tokenizer):
    assert tokenizer.prefix == [tokenizer.control["<bos>"]]


@kinds
def test_newline_tokens_begin_a_line(tokenizer):
    assert tokenizer.newline_ids
    assert all(tokenizer.token_bytes(token).startswith(b"\n") for token in tokenizer.newline_ids)
    assert tokenizer.encode("\n")[0] in tokenizer.newline_ids


async def test_encoding_leaves_the_loop_and_agrees():
    tokenizer = TOKENIZERS["byte-level"]
    assert await tokenizer.aencode_batch(["hello world", "no"]) == [tokenizer.encode("hello world"), await tokenizer.aencode("no")]


def test_unknown_decoder_is_refused_at_start():
    document = json.loads(KINDS["byte-level"]())
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(TokenizerUnsupported):
        Tokenizer(json.dumps(document))
