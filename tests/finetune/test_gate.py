import math
import random

import pytest

from services.finetune.gate import Outcomes, judge, lower_bound, mcnemar, resampled


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (5, 0, 0.0625),  # 2 / 2^5
        (6, 0, 0.03125),  # 2 / 2^6: the fewest rows that can prove anything
        (9, 1, 22 / 1024),  # 2 (1 + 10) / 2^10
        (1, 9, 22 / 1024),
        (15, 5, 0.04138946533203125),  # the exact binomial test of 5 in 20 at 1/2
        (121, 59, 4.434449263755176e-06),
    ],
)
def test_mcnemar_gives_the_exact_binomial_values(ours: int, theirs: int, p: float) -> None:
    assert mcnemar(ours, theirs) == pytest.approx(p, rel=1e-6)


def test_the_bootstrap_bound_is_the_normal_one_where_rows_are_many() -> None:
    draw = random.Random(3)
    gains = [draw.gauss(0.5, 2.0) for _ in range(2_000)]
    mean = math.fsum(gains) / len(gains)
    spread = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains)) / len(gains)
    bounds = [lower_bound(resampled(gains, [1.0] * len(gains), seed)) for seed in (1, 1, 2)]
    assert bounds[0] == pytest.approx(mean - 1.6449 * spread, abs=0.08 * spread)
    assert bounds[0] == bounds[1] != bounds[2]


def test_the_bootstrap_weighs_a_row_by_its_tokens() -> None:
    assert lower_bound(resampled([2.0] * 50, [4.0] * 50, 0)) == pytest.approx(0.5)
    long_and_better, short_and_worse = [10.0] * 30 + [-0.1] * 30, [100.0] * 30 + [1.0] * 30
    assert lower_bound(resampled(long_and_better, short_and_worse, 0)) > 0.09
    assert lower_bound(resampled(long_and_better, [1.0] * 60, 0)) < 6


def outcomes(right: int, rows: int = 100) -> Outcomes:
    return Outcomes(tuple(float(row < right) for row in range(rows)))


def test_T11_a_worse_candidate_does_not_pass() -> None:
    verdict = judge("ACCURACY", outcomes(70), {"current": outcomes(80), "base": outcomes(20)})
    assert not verdict.passed
    current, base = verdict.comparisons
    assert (current.beats, base.beats) == (False, True)
    assert (current.difference, current.only_candidate_right, current.only_other_right) == (-0.1, 0, 10)


def test_T11_an_equal_and_a_barely_better_candidate_do_not_pass() -> None:
    for right in (80, 85):  # 5 rows better can be luck: p = 0.0625
        assert not judge("ACCURACY", outcomes(right), {"current": outcomes(80)}).passed
    assert judge("ACCURACY", outcomes(86), {"current": outcomes(80)}).passed


def test_T11_the_margin_is_part_of_the_gate() -> None:
    assert judge("ACCURACY", outcomes(90), {"current": outcomes(80)}, margin=0.1).passed
    assert not judge("ACCURACY", outcomes(90), {"current": outcomes(80)}, margin=0.11).passed


def test_T11_a_candidate_worse_than_the_base_does_not_pass() -> None:
    assert not judge("ACCURACY", outcomes(80), {"current": outcomes(20), "base": outcomes(90)}).passed


def test_T11_few_rows_prove_nothing() -> None:
    assert not judge("ACCURACY", outcomes(9, 9), {"base": outcomes(0, 9)}).passed
    assert judge("ACCURACY", outcomes(10, 10), {"base": outcomes(0, 10)}).passed


def loss(mean: float, seed: int, rows: int = 60) -> Outcomes:
    draw = random.Random(seed)
    return Outcomes(tuple(12 * (mean + draw.gauss(0, 0.2)) for _ in range(rows)), (12.0,) * rows)


def test_T11_losses_pass_only_where_the_bound_is_over_the_margin() -> None:
    better = judge("LOSS", loss(1.0, 1), {"base": loss(1.5, 2)}, margin=0.3)
    assert better.passed
    (comparison,) = better.comparisons
    assert comparison.p_value == 1 / 4_000
    assert 0.3 < comparison.lower_bound < comparison.difference
    assert comparison.candidate == pytest.approx(1.0, abs=0.1)
    assert not judge("LOSS", loss(1.0, 1), {"base": loss(1.5, 2)}, margin=0.6).passed
    assert not judge("LOSS", loss(1.5, 1), {"base": loss(1.0, 2)}).passed
    assert not judge("LOSS", loss(1.0, 1), {"base": loss(1.01, 2)}).passed
    assert not judge("LOSS", loss(1.0, 1, rows=9), {"base": loss(1.5, 2, rows=9)}).passed  # few rows prove nothing here, either
    assert judge("LOSS", loss(1.0, 1, rows=10), {"base": loss(1.5, 2, rows=10)}).passed


def test_what_cannot_be_compared_is_refused() -> None:
    for metric, candidate, others in (
        ("ACCURACY", outcomes(1), {}),
        ("ACCURACY", outcomes(1), {"base": outcomes(1, 99)}),
        ("ACCURACY", Outcomes((0.5,)), {"base": Outcomes((1.0,))}),
        ("ACCURACY", Outcomes((1.0,), (1.0,)), {"base": Outcomes((1.0,), (1.0,))}),
        ("LOSS", Outcomes((math.nan,)), {"base": Outcomes((1.0,))}),
        ("LOSS", Outcomes((1.0,), (2.0,)), {"base": Outcomes((1.0,), (3.0,))}),
        ("LOSS", Outcomes(()), {"base": Outcomes(())}),
    ):
        with pytest.raises(ValueError):
            judge(metric, candidate, others)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        judge("LOSS", outcomes(1), {"base": outcomes(1)}, margin=-1)


def test_a_verdict_as_json_leaves_out_what_is_unknown() -> None:
    said = judge("ACCURACY", outcomes(90), {"current": outcomes(80)}).as_json()
    assert said["passed"] is True
    assert said["comparisons"][0]["only_candidate_right"] == 10
    assert "only_candidate_right" not in judge("LOSS", loss(1.0, 1), {"base": loss(1.5, 2)}).as_json()["comparisons"][0]
    assert said["comparisons"][0]["p_value"] == pytest.approx(2 / 1024)
