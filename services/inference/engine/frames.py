"""Messages as bytes on the socket between the two processes: four bytes of length, then a msgpack list. Pure."""

import struct
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from services.inference.engine.calls import FromEngine, ToEngine

MOST_BYTES = 256 * 2**20  # of one frame; anything longer is not ours

_LENGTH = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
T = TypeVar("T")


class FrameError(Exception):
    """The bytes are not a frame."""


def sealed(message: ToEngine) -> msgspec.Raw:
    """A message for `encode`, known to be readable: raises FrameError to whoever made it, instead of hurting all who share its frame."""
    try:
        raw = _encoder.encode(message)
        _to_engine.decode(raw)
    except (msgspec.MsgspecError, TypeError, OverflowError) as failure:
        raise FrameError(f"not a message: {failure}") from failure
    return msgspec.Raw(raw)


def encode(messages: Sequence[FromEngine | ToEngine | msgspec.Raw]) -> bytes:
    """One frame."""
    body = _encoder.encode(messages)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[T]):
    """Bytes in, in any pieces; whole messages out."""

    def __init__(self, decoder: "msgspec.msgpack.Decoder[list[T]]") -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Messages completed by `data`, in order. Raises FrameError for what cannot be one."""
        buffer = self._buffer
        buffer += data
        messages: list[T] = []
        at = 0
        while len(buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            if length > MOST_BYTES:
                raise FrameError(f"a frame of {length} bytes")
            end = at + _LENGTH.size + length
            if end > len(buffer):
                break
            try:
                messages += self._decoder.decode(bytes(buffer[at + _LENGTH.size : end]))
            except msgspec.MsgspecError as failure:
                raise FrameError(f"a frame of {length} bytes that cannot be read") from failure
            at = end
        del buffer[:at]
        return messages


def from_engine() -> FrameReader[FromEngine]:
    """For the parent."""
    return FrameReader(msgspec.msgpack.Decoder(list[FromEngine]))


def to_engine() -> FrameReader[ToEngine]:
    """For the child."""
    return FrameReader(msgspec.msgpack.Decoder(list[ToEngine]))
