"""What influence is given to: a text cut into words, sentences or tokens that together are the text (pure).

Ranges are half-open, in characters, in order, without gap or overlap. Each holds something visible, so that leaving one out changes what
is said: blanks and punctuation go with the word before them, as does anything before the first word with the first.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise

__all__ = ["kept", "sentences", "tokens", "words"]

Range = tuple[int, int]

# Scripts written without blanks: Chinese, Japanese, Thai, Lao, Burmese, Khmer. Korean has blanks.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
# One of their characters, or a run of letters and digits with what joins them: "don't", "well-known", "3.5", "a_b".
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+(?:[-'’.,:/](?:(?![{_UNSPACED}])\w)+)*")
_SENTENCE_END = re.compile(r"(?:[.!?…]+[\"'”’)\]]*(?=\s)|[。！？；]+[”’」』）]*|\n)\s*")
_INITIAL = re.compile(r"(?:^|[\s(])[^\W\d_]\.$")  # "J. Smith" is no end


def words(text: str) -> list[Range]:
    """Words; single characters, with their marks, where a script has no blanks. A text without any is one range, an empty one none."""
    starts = [
        match.start()
        for match in _WORD.finditer(text)
        if any(character.isalnum() and not _is_mark(character) for character in match.group())
    ]
    return _cut(text, starts)


def sentences(text: str) -> list[Range]:
    """Sentences and lines."""
    starts, at = [0], 0
    for match in _SENTENCE_END.finditer(text):
        if not _INITIAL.search(text[at : match.start() + 1]) and match.end() < len(text):
            at = match.end()
            starts.append(at)
    return _cut(text, [start for start, end in zip(starts, [*starts[1:], len(text)], strict=True) if text[start:end].strip()])


def tokens(text: str, spans: Iterable[Range]) -> list[Range]:
    """A tokenizer's tokens, given as ranges of UTF-8 bytes: widened to whole characters, blank ones joined to what comes before."""
    data, starts, at = text.encode(), [], 0
    for first, last in spans:
        if first >= at and data[first:last].decode(errors="ignore").strip():
            starts.append(len(data[:first].decode(errors="ignore")))
        at = max(at, last)
    return _cut(text, sorted(set(starts)))


def kept(text: str, ranges: Sequence[Range], keep: Sequence[bool]) -> str:
    """The text without the units that are not kept. Blanks at its end that only became its end go too."""
    if all(keep):
        return text
    said = "".join(text[first:last] for (first, last), stays in zip(ranges, keep, strict=True) if stays)
    return said if text[-1:].isspace() else said.rstrip()


def _cut(text: str, starts: Sequence[int]) -> list[Range]:
    if not text:
        return []
    borders = [0, *starts[1:], len(text)]
    return [(first, last) for first, last in pairwise(borders) if last > first]


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
