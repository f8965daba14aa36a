"""Where in a prompt's tokens the caller's texts lie."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.pretrained.control import Control
from services.pretrained.tokenizer import Tokenizer

__all__ = ["Located", "Unlocated", "locate"]

Part = str | Control
Render = Callable[[Sequence[str]], Sequence[Part]]
MARK = "\x00"  # no text may hold one


class Unlocated(Exception):
    """The prompt's form does not show its texts whole, in order and once each."""


@dataclass(frozen=True, slots=True)
class Located:
    """A prompt's ids, and for each text the tokens that touch it with the bytes of the text they cover: (place in `ids`, first, last)."""

    ids: tuple[int, ...]
    texts: tuple[tuple[tuple[int, int, int], ...], ...]


def locate(tokenizer: Tokenizer, render: Render, texts: Sequence[str]) -> Located:
    """Tokenise the prompt that `render` makes of `texts`. Raises Unlocated.

    A second prompt, with a mark in place of each text, shows what is the form's own. A text may lose the blanks around it.
    """
    form = _runs(render([MARK if text else "" for text in texts]))
    prompt = _runs(render(texts))
    shown = [text for text in texts if text]
    if len(form) != len(prompt) or sum(run.count(MARK) for run in form if isinstance(run, str)) != len(shown):
        raise Unlocated
    ids: list[int] = []
    found: list[tuple[tuple[int, int, int], ...]] = []
    for own, run in zip(form, prompt, strict=True):
        if isinstance(run, Control):
            if own != run:
                raise Unlocated
            ids.append(run.id)
            continue
        if isinstance(own, Control):
            raise Unlocated
        count = own.count(MARK)
        places = _places(own.split(MARK), shown[len(found) : len(found) + count], run)
        pieces = tokenizer.pieces(run)
        if [piece.id for piece in pieces] != tokenizer.encode(run):
            raise Unlocated
        for first, last, lead in places:
            within = [
                (len(ids) + place, max(piece.start_byte, first) - first + lead, min(piece.end_byte, last) - first + lead)
                for place, piece in enumerate(pieces)
                if piece.end_byte > first and piece.start_byte < last
            ]
            found.append(tuple(within))
        ids += [piece.id for piece in pieces]
    each = iter(found)
    return Located(tuple(ids), tuple(next(each) if text else () for text in texts))


def _runs(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts joined, as the tokenizer takes them."""
    runs: list[Part] = []
    for part in parts:
        if isinstance(part, str) and runs and isinstance(runs[-1], str):
            runs[-1] += part
        elif part != "":
            runs.append(part)
    return runs


def _places(form: Sequence[str], texts: Sequence[str], run: str) -> list[tuple[int, int, int]]:
    """Bytes of the run at which each text lies, and how many bytes of the text itself come before. Raises Unlocated."""
    for shown in (list(texts), [text.strip() for text in texts]):
        if run == "".join(own + text for own, text in zip(form, [*shown, ""], strict=True)):
            break
    else:
        raise Unlocated
    places, at = [], 0
    for own, whole, text in zip(form, texts, shown, strict=False):
        at += len(own.encode())
        lead = re.match(r"\s*", whole)
        before = 0 if text == whole or lead is None else len(lead.group().encode())
        places.append((at, at + len(text.encode()), before))
        at += len(text.encode())
    return places
