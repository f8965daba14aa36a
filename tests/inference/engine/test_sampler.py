"""The draw: known answers of Philox, transformers' own truncation, the right frequencies, and no neighbour that matters."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from services.inference.engine.calls import Sampling
from services.inference.engine.sampler import (
    CANDIDATES,
    choose,
    choose_among,
    largest,
    needs,
    philox,
    uniform,
)
from services.inference.engine.step import Draw

WIDE = 5000  # more than the nucleus looked at first


def draw(index: int = 0, position: int = 0, history: Sequence[int] = (), prompt: int = 0, **sampling: Any) -> Draw:
    extra = {name: sampling.pop(name) for name in ("barred", "top_logprobs") if name in sampling}
    return Draw(Sampling(**{"seed": 1} | sampling), index, position, history, prompt, **extra)


def logits(rows: int, size: int = WIDE, seed: int = 3, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the reference implementation's published vectors
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_answers_the_published_vectors(counter: list[int], key: list[int], answer: list[int]) -> None:
    made = philox(np.array([counter], dtype=np.uint64).T.copy(), np.array([key], dtype=np.uint64).T.copy())
    assert made[:, 0].tolist() == answer


def test_a_uniform_depends_on_seed_index_and_position_only() -> None:
    seeds, indexes, positions = [5, -5, 2**63 + 1, 5, 5], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]
    together = uniform(seeds, indexes, positions)
    assert [uniform([s], [i], [p])[0] for s, i, p in zip(seeds, indexes, positions, strict=True)] == together.tolist()
    assert len(set(together.tolist())) == 5 and together.min() >= 0.0 and together.max() < 1.0


KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {},
    {"top_k": 7},
    {"top_k": 2000},
    {"top_p": 0.8, "temperature": 1.7},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    {"repetition": 1.3, "frequency": 0.4, "presence": 0.2, "history": [3, 9, 9, 4], "prompt": 2, "top_k": 5},
    {"logit_bias": ((11, 6.0), (12, -100.0)), "barred": (3,)},
    {"temperature": 0.0, "top_logprobs": 3},
)


def test_neither_neighbours_nor_their_order_change_a_row() -> None:
    rows = logits(3 * len(KINDS))
    draws = [draw(index=n % 4, position=n, seed=n * 77, **KINDS[n % len(KINDS)]) for n in range(len(rows))]
    alone = [choose(rows[n : n + 1].clone(), [draws[n]])[0] for n in range(len(rows))]
    assert choose(rows.clone(), draws) == alone
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(5)).tolist()
    assert choose(rows[order].clone(), [draws[n] for n in order]) == [alone[n] for n in order]
    for size in (2, 5):
        parts = [choose(rows[n : n + size].clone(), draws[n : n + size]) for n in range(0, len(rows), size)]
        assert [choice for part in parts for choice in part] == alone


def test_candidates_decide_as_the_whole_row_does() -> None:
    rows = logits(40)
    draws = [draw(position=n, top_k=n + 1, top_p=0.9) if n % 3 else draw(temperature=0.0) for n in range(40)]
    assert {needs(d) for d in draws} == {1} | {n + 1 for n in range(40) if n % 3}
    values, ids = largest(rows, 40)
    assert choose_among(values, ids, draws) == choose(rows.clone(), draws)


@pytest.mark.parametrize(
    "kind",
    [{"top_logprobs": 0}, {"logit_bias": ((1, 1.0),)}, {"repetition": 1.1}, {"barred": (1,)}, {"top_k": CANDIDATES + 1}, {"presence": 0.1}],
)
def test_candidates_do_not_decide(kind: dict[str, Any]) -> None:
    assert needs(draw(**{"top_k": 5} | kind)) is None


def frequencies(row: torch.Tensor, count: int, **sampling: Any) -> torch.Tensor:
    draws = [draw(position=n, **sampling) for n in range(count)]
    tokens = [choice.token for choice in choose(row.expand(count, -1).clone(), draws)]
    return torch.bincount(torch.tensor(tokens), minlength=len(row)).double()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_k": 6}, {"top_p": 0.85}, {"min_p": 0.1}, {"top_k": 8, "top_p": 0.9}])
def test_draws_follow_the_distribution(sampling: dict[str, Any]) -> None:
    """Chi-square at 0.1 % over 12 ids and 4,000 draws; the seed is fixed, so it passes always or never."""
    row = logits(1, 12, spread=1.2)[0]
    expected = warped(row, **sampling) * 4000
    seen = frequencies(row, 4000, **sampling)
    assert not bool(seen[expected == 0].any())
    alive = expected > 0
    statistic = float((((seen - expected) ** 2)[alive] / expected[alive]).sum())
    assert statistic < [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32, 26.12, 27.88, 29.59, 31.26][int(alive.sum()) - 1]


def warped(row: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> torch.Tensor:
    """transformers' own warpers, in its order."""
    from transformers.generation import logits_process as lp

    scores = row[None].double()
    steps = [(lp.TemperatureLogitsWarper, temperature, 1.0), (lp.TopKLogitsWarper, top_k, 0), (lp.TopPLogitsWarper, top_p, 1.0)]
    for warper, value, off in [*steps, (lp.MinPLogitsWarper, min_p, 0.0)]:
        if value != off:
            scores = warper(value)(None, scores)
    return torch.softmax(scores, -1)[0]


@pytest.mark.parametrize("sampling", [{"top_p": 0.3}, {"top_p": 0.97, "temperature": 4.0}, {"top_k": 1500, "top_p": 0.9}, {"min_p": 0.2}])
def test_only_kept_ids_of_a_wide_vocabulary_are_drawn(sampling: dict[str, Any]) -> None:
    row = logits(1)[0]
    allowed = set(warped(row, **sampling).nonzero()[:, 0].tolist())
    seen = set(frequencies(row, 200, **sampling).nonzero()[:, 0].tolist())
    assert seen <= allowed and len(seen) > 1


def test_the_nucleus_beyond_the_ids_looked_at_first() -> None:
    row = torch.linspace(0.5, 0.0, WIDE)  # flat: half of the mass needs about half of the ids
    seen = frequencies(row, 300, top_p=0.6).nonzero()[:, 0]
    assert int(seen.max()) > 2000 and int(seen.max()) <= int((warped(row, top_p=0.6) > 0).sum())


def test_penalties_equal_transformers_and_the_published_formula() -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    rows = logits(1, 50)
    history = [4, 4, 7, 9, 9, 9]
    wanted = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([history]), rows.clone())[0]
    wanted[9] -= 2 * 0.5 + 0.25  # output is history[4:]: 9 twice
    raw = torch.log_softmax(wanted, -1)
    best = int(raw.argmax())
    rows[0, 9] = rows[0].max() + 0.1  # it would win without its penalty
    kept = draw(temperature=0.0, history=history, prompt=4, repetition=1.4, frequency=0.5, presence=0.25)
    assert choose(rows.clone(), [draw(temperature=0.0)])[0].token == 9
    assert choose(rows.clone(), [kept])[0].token == best


def test_bias_and_barred_ids() -> None:
    rows = logits(3, 50)
    order = rows[0].argsort(descending=True).tolist()
    banned, second = order[0], order[1]
    chosen = choose(
        rows[[0, 0, 0]].clone(),
        [
            draw(temperature=0.0, barred=(banned,)),
            draw(temperature=0.0, logit_bias=((banned, -200.0),)),
            draw(logit_bias=((33, 50.0), (33, 50.0))),
        ],
    )
    assert [choice.token for choice in chosen] == [second, second, 33]


def test_logprobs_are_raw() -> None:
    rows = logits(2, 300)
    raw = torch.log_softmax(rows, -1)
    greedy, biased = choose(
        rows.clone(),
        [draw(temperature=0.0, top_logprobs=5), draw(temperature=0.3, logit_bias=((17, 100.0),), top_logprobs=0)],
    )
    assert greedy.token is not None and greedy.logprob == pytest.approx(float(raw[0, greedy.token]), abs=1e-5)
    values, ids = raw[0].topk(5)
    assert [i for i, _ in greedy.top] == ids.tolist() and [v for _, v in greedy.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert biased.token == 17 and biased.logprob == pytest.approx(float(raw[1, 17]), abs=1e-5) and biased.top == ()


def test_equal_logits_go_to_the_lower_id() -> None:
    row = torch.zeros(1, 1000)
    row[0, 500:900] = 2.0
    values, ids = largest(row, 64)
    assert ids[0].tolist() == list(range(500, 564)) and values.unique().tolist() == [2.0]
    row[0, 700] = 3.0
    assert largest(row, 3)[1][0].tolist() == [700, 500, 501]
    assert set(frequencies(row[0], 50, top_k=2, temperature=50.0).nonzero()[:, 0].tolist()) == {500, 700}
    assert choose(torch.zeros(1, 1000), [draw(temperature=0.0)])[0].token == 0


def test_a_bad_row_fails_alone() -> None:
    rows = logits(4, 60)
    rows[1, 30] = math.nan
    bars = tuple(range(60))
    choices = choose(rows, [draw(), draw(top_k=3), draw(barred=bars), draw(temperature=0.0)])
    assert [choice.error for choice in choices] == [None, "nan", "barred", None]
    assert choices[0].token is not None and choices[3].token is not None
    for kind in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        assert choose(torch.full((1, 60), math.nan), [draw(**kind)])[0].error == "nan"
