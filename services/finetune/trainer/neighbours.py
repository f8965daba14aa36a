"""Vectors of the rows that were learnt, as a replica would embed their texts: what FindNearestExamples is answered from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from services.finetune.nearest import MAX_ROWS, pack
from services.finetune.rows import Row
from services.finetune.trainer.batches import Example, layout
from services.finetune.trainer.model import Base
from services.pretrained.tokenizer import Tokenizer

__all__ = ["chosen", "index", "means"]

LEAST_TOKENS = 65_536  # that are read for an index, however short the run was


def chosen(rows: Sequence[tuple[int, Row]], tokenizer: Tokenizer, seq_len: int, room: int) -> list[tuple[int, Example]]:
    """Number and text of the rows that are indexed, by number: all, or the first by digest, a sample that no order of theirs decides.

    Args:
        rows: by number.
        tokenizer: the base's.
        seq_len: tokens of a text; a longer one is known by its beginning.
        room: tokens of all together, so that a short run does not end in a long reading.
    """
    found: list[tuple[int, Example]] = []
    for number, row in sorted(rows, key=lambda each: each[1].digest)[:MAX_ROWS]:
        example = Example((*tokenizer.prefix, *tokenizer.encode("\n".join(row.said)))[:seq_len], label=0)
        room -= len(example.ids)
        if room < 0 and found:
            break
        found.append((number, example))
    return sorted(found, key=lambda each: each[0])


def index(base: Base, tokenizer: Tokenizer, rows: Sequence[tuple[int, Row]], seq_len: int, step_tokens: int, read_tokens: int) -> bytes:
    """The index of numbered rows, with the model as it is now; `read_tokens` is what the run has read of them, as often as it did."""
    picked = chosen(rows, tokenizer, seq_len, max(LEAST_TOKENS, read_tokens))
    return pack((number for number, _ in picked), means(base, [example for _, example in picked], step_tokens))


def means(base: Base, examples: Sequence[Example], step_tokens: int) -> NDArray[np.float32]:
    """[examples, width]: the mean of each one's final states, as `EmbedTexts` has it."""
    base.model.eval()
    found = np.zeros((len(examples), base.width), dtype=np.float32)
    ranked = sorted(range(len(examples)), key=lambda at: len(examples[at].ids))
    at = 0
    with torch.no_grad():
        while at < len(ranked):
            count, room = 0, step_tokens
            while at + count < len(ranked) and (count == 0 or len(examples[ranked[at + count]].ids) <= room):
                room -= len(examples[ranked[at + count]].ids)
                count += 1
            members = ranked[at : at + count]
            at += count
            (batch,) = layout([examples[member] for member in members], 2**31, True, base.device)
            states = base.states(replace(batch, select=torch.arange(batch.tokens, device=base.device)))
            starts = 0
            for member in members:
                length = len(examples[member].ids)
                found[member] = states[starts : starts + length].mean(0).cpu().numpy()
                starts += length
    return found
