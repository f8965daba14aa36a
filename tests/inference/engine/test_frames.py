import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from services.inference.engine.calls import Abort, Drain, FromEngine, Generate, Limits, Sampling, Stop, ToEngine, Token
from services.inference.engine.frames import MOST_BYTES, FrameError, encode, from_engine, sealed, to_engine

CALL = Generate("a", (1, 2), Sampling(seed=2**63), Limits(5, (0,)), deadline_s=1.5, tenant="t", cache_salt=b"\x00\xff", time_limit_s=2.0)
FRAMES: list[list[ToEngine]] = [[CALL, Stop("a", 1)], [Abort(("a", "b"))], [], [Drain()]]


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40))
def test_frames_survive_any_cutting(cuts: list[int]):
    data = b"".join(map(encode, FRAMES))
    reader, messages, at = to_engine(), list[ToEngine](), 0
    for cut in (*cuts, len(data)):
        messages += reader.feed(data[at : at + cut])
        at += cut
    assert messages == [message for frame in FRAMES for message in frame]


def test_a_step_of_tokens_comes_back():
    events: list[FromEngine] = [Token(str(n), n % 4, n * 1000, -0.5, ((1, -0.5), (2, -1.5))) for n in range(32)]
    assert from_engine().feed(encode(events)) == events


@pytest.mark.parametrize(
    "data",
    [
        (MOST_BYTES + 1).to_bytes(4),
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x01\x01",
        (5).to_bytes(4) + msgspec.msgpack.encode([{}])[:1] * 5,
    ],
)
def test_what_is_not_a_frame_is_an_error(data: bytes):
    with pytest.raises(FrameError):
        from_engine().feed(data)


def test_a_sealed_message_is_a_message():
    assert to_engine().feed(encode([sealed(CALL), sealed(Drain())])) == [CALL, Drain()]


@pytest.mark.parametrize("seed", ["1", 1.5, None, 2**64, object()])
def test_what_cannot_be_read_is_refused_before_it_is_sent(seed: object):
    with pytest.raises(FrameError):
        sealed(msgspec.structs.replace(CALL, sampling=Sampling(seed=seed)))  # type: ignore[arg-type]
