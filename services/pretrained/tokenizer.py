"""Text to ids and back, with the `tokenizers` library alone. Control ids come from templates, never from a caller's text."""

import asyncio
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Tokenizer

from services.pretrained.control import Control

__all__ = ["Piece", "Tokenizer", "TokenizerUnsupported"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class TokenizerUnsupported(Exception):
    """The model's tokenizer cannot be turned back into bytes token by token."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of a text: its id, its raw bytes, and the UTF-8 bytes of the source it covers, half-open."""

    id: int
    token: bytes
    start_byte: int
    end_byte: int


def _byte_level() -> dict[str, int]:
    """The printable stand-ins that byte-level vocabularies use for the 256 bytes."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + place): byte for place, byte in enumerate(moved)}


class Tokenizer:
    """Immutable after construction, so safe from several threads. Long texts: use the `a…` methods, which leave the event loop."""

    def __init__(self, definition: str | _Tokenizer) -> None:
        """`definition`: the text of tokenizer.json, or what it was read into.

        Raises TokenizerUnsupported where its decoder is of an unknown kind.
        """
        tokenizer = _Tokenizer.from_str(definition) if isinstance(definition, str) else definition
        added = tokenizer.get_added_tokens_decoder()
        # Runs of blanks are ordinary text; every other added token may steer the model ("[multimodal]", "<think>").
        control = {id: token for id, token in added.items() if token.special or token.content.strip()}
        self.control = {token.content: id for id, token in control.items()}  # spelling to id: what user text must not become
        self._special = frozenset(id for id, token in control.items() if token.special)
        tokenizer.add_special_tokens([_as_special(token) for token in control.values() if not token.special])
        tokenizer.encode_special_tokens = True  # "encode their spelling", as plain text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._barred = frozenset(control) - {self.control.get(getattr(tokenizer.model, "unk_token", None) or "", -1)}
        self._kind = _decoder_kind(tokenizer)
        self._byte_level = _byte_level()
        self._bytes: dict[int, bytes] = {}
        self.prefix = self._prefix()

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer":
        """The tokenizer of a model's directory. Blocking: about a second for a vocabulary of 262,144."""
        return cls(_Tokenizer.from_file(str(directory / "tokenizer.json")))

    @property
    def size(self) -> int:
        """Ids below this exist."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no control id, no prefix."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._barred.isdisjoint(ids):
            return ids
        # A merge that spells a control token: character by character none is left.
        return [
            token
            for character in text
            for token in self._tokenizer.encode(character, add_special_tokens=False).ids
            if token not in self._barred
        ]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text."""
        return [self.encode(text) for text in texts]

    async def aencode(self, text: str) -> list[int]:
        """`encode` in a thread; the library frees the interpreter lock."""
        return await asyncio.to_thread(self.encode, text)

    async def aencode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` in a thread."""
        return await asyncio.to_thread(self.encode_batch, texts)

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of plain text with the source bytes they cover: in order, together the whole text.

        A token that is a part of a character covers the whole character, as do its other parts; no others overlap.
        """
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        starts = _byte_offsets(text)
        found: list[Piece] = []
        done = 0  # characters covered so far
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            begin, done = min(start, done), max(end, done)
            found.append(Piece(token, self.token_bytes(token), starts[begin], starts[done]))
        if found and done < len(text):  # what a normaliser dropped at the end belongs to the last token
            last = found[-1]
            found[-1] = Piece(last.id, last.token, last.start_byte, starts[-1])
        return found

    def split_control(self, text: str) -> list[str | Control]:
        """A template's own text as plain runs and control tokens, longest spelling first."""
        parts: list[str | Control] = []
        at = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > at:
                parts.append(text[at : match.start()])
            parts.append(Control(self.control[match.group()]))
            at = match.end()
        if at < len(text):
            parts.append(text[at:])
        return parts

    def encode_parts(self, parts: Iterable[str | Control]) -> list[int]:
        """Ids of a rendered prompt. Neighbouring runs are one text for the tokenizer, as when the whole had been rendered at once."""
        ids: list[int] = []
        run: list[str] = []
        for part in parts:
            if isinstance(part, str):
                run.append(part)
                continue
            if run:
                ids += self.encode("".join(run))
                run.clear()
            ids.append(part.id)
        return ids + (self.encode("".join(run)) if run else [])

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's spelling. Unknown ids: empty."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._find_bytes(token)
        return known

    def text_bytes(self, token: int) -> bytes:
        """The bytes a generated token adds to an output's text: none for a special token such as the end of a turn."""
        return b"" if token in self._special else self.token_bytes(token)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids, control tokens left out; broken characters become U+FFFD."""
        return b"".join(map(self.text_bytes, ids)).decode("utf-8", errors="replace")

    @cached_property
    def newline_ids(self) -> tuple[int, ...]:
        """Ids of ordinary tokens that begin a new line, the 64 shortest: where a plain model's one-line answer ends."""
        beginnings = ("\n", "<0x0A>", "Ċ")  # the last is byte-level for a line feed
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = {token for spelling, token in vocabulary.items() if spelling.startswith(beginnings)} - self._barred
        found = {token for token in found if self.token_bytes(token)[:1] == b"\n"}
        return tuple(sorted(found, key=lambda token: (len(self.token_bytes(token)), token))[:64])

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        spellings = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) if spellings else r"(?!)")

    def _prefix(self) -> list[int]:
        """The ids that the model expects before any text (its beginning-of-text token), or none."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for at in range(len(whole) - len(plain) + 1):
            if whole[at : at + len(plain)] == plain:
                return whole[:at]
        return []

    def _find_bytes(self, token: int) -> bytes:
        spelling = self._tokenizer.id_to_token(token)
        if spelling is None:
            return b""
        if spelling in self.control and self.control[spelling] == token:
            return spelling.encode()
        if self._kind == "byte-level":
            if all(character in self._byte_level for character in spelling):
                return bytes(self._byte_level[character] for character in spelling)
            return spelling.encode()
        if match := _BYTE_TOKEN.match(spelling):
            return bytes([int(match.group(1), 16)])
        return spelling.replace("▁", " ").encode()


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _decoder_kind(tokenizer: _Tokenizer) -> str:
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    if "ByteLevel" in kinds:
        return "byte-level"
    if kinds & {"ByteFallback", "Metaspace"}:
        return "byte-fallback"
    raise TokenizerUnsupported(f"decoder of {sorted(kinds)}: known are ByteLevel, ByteFallback and Metaspace")


def _byte_offsets(text: str) -> list[int]:
    """UTF-8 offset of each character border, from 0 to the length in bytes."""
    offsets = [0]
    for character in text:
        code = ord(character)
        offsets.append(offsets[-1] + (1 if code < 0x80 else 2 if code < 0x800 else 3 if code < 0x10000 else 4))
    return offsets
