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


def chosen(rows: Sequence[tuple[int, Row]]) -> list[tuple[int, Row]]:
    """Number and row of those that are indexed: all, or the first by digest, in the order of their numbers."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return sorted(sorted(rows, key=lambda each: each[1].digest)[:MAX_ROWS], key=lambda each: each[0])


def index(base: Base, tokenizer: Tokenizer, rows: Sequence[tuple[int, Row]], seq_len: int, step_tokens: int) -> bytes:
    """The index of numbered rows, with the model as it is now. A text longer than `seq_len` is known by its beginning."""
    picked = chosen(rows)
    examples = [Example((*tokenizer.prefix, *tokenizer.encode("\n".join(row.said)))[:seq_len], label=0) for _, row in picked]
    return pack((number for number, _ in picked), means(base, examples, step_tokens))


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
