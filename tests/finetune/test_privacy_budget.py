"""A dataset's privacy over all its jobs: added up, quoted, and refused over the ceiling."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from argosy.v1 import finetune_pb2 as pb
from services.finetune.privacy import Budget, Spent
from tests.finetune.test_control_plane import ROWS, House, house, info_of, reason, refused

Job = pb.FineTuneJob


@pytest.mark.parametrize(
    ("spent", "ceiling", "asked", "may"),
    [
        (Spent(), 8.0, Spent(8.0, 0.001), True),
        (Spent(3.1, 0.002), 8.0, Spent(4.9, 0.001), True),
        (Spent(3.1, 0.002), 8.0, Spent(4.901, 0.001), False),
        (Spent(100.0, 0.002), 0.0, Spent(8.0, 0.001), True),
        (Spent(1.0, 0.009), 8.0, Spent(1.0, 0.002), False),
    ],
)
def test_promises_add_up_to_the_ceiling_and_deltas_to_one_row(spent: Spent, ceiling: float, asked: Spent, may: bool) -> None:
    assert Budget(spent, ceiling, rows=100).allows(asked) == may


def private(there: House, epsilon: float, version: str = "", **more: Any) -> Any:
    spec = pb.FineTuneSpec(base_model="models/tiny", train_version=version or there.version, method=pb.TUNE_METHOD_CLASSIFY)
    spec.privacy.CopyFrom(pb.Privacy(epsilon=epsilon, **more))
    return spec


async def test_jobs_of_one_dataset_share_its_budget_and_the_quote_says_what_is_left(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, privacy_epsilon_per_dataset=10.0) as there:
        first = await there.create(spec=private(there, 6.0))
        said = first.quote.privacy
        assert (said.spent_epsilon, said.asked_epsilon, said.epsilon_ceiling) == (0.0, 6.0, 10.0)
        assert (said.asked_delta, said.delta_ceiling) == (pytest.approx(1 / 400), pytest.approx(1 / 40))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await there.create(spec=private(there, 4.5))
        assert reason(error.value) == "PRIVACY_BUDGET_EXCEEDED" and float(info_of(error.value)["limit"]) == 4.0
        asked = there.asked(spec=private(there, 4.5))
        asked.validate_only = True
        assert await refused(there("CreateFineTuneJob", asked)) == "PRIVACY_BUDGET_EXCEEDED"
        layout = {"encoding": 2, "text_columns": ["text"], "label_column": "label", "delimiter": "\t", "header": True}
        other = await there.tenant.dataset("other", layout=layout)
        same = await there.tenant.version(other.name, ROWS.encode())  # the same rows under another name
        assert await refused(there.create(spec=private(there, 4.5, same.name))) == "PRIVACY_BUDGET_EXCEEDED"
        fresh = await there.tenant.version(other.name, ROWS.replace("Headline", "Title").encode())
        assert (await there.create(spec=private(there, 9.0, fresh.name))).quote.privacy.spent_epsilon == 0.0
        assert not (await there.create()).quote.HasField("privacy")


async def test_a_job_that_has_ended_counts_with_what_it_was_charged(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, privacy_epsilon_per_dataset=10.0) as there:
        first = await there.create(spec=private(there, 8.0))
        trainer = await there.trainer(first)
        assert (await trainer.claims()).epsilon_left == 8.0
        await trainer.says(step=1, target_step=4, epsilon_charged=2.5)
        assert await refused(there.create(spec=private(there, 4.0))) == "PRIVACY_BUDGET_EXCEEDED"  # it may still spend all of its 8
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=first.name))
        await there.until(first, lambda found: found.state == Job.STATE_CANCELLED)
        second = await there.create(spec=private(there, 4.0))
        assert second.quote.privacy.spent_epsilon == 2.5
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=second.name))
        await there.until(second, lambda found: found.state == Job.STATE_CANCELLED)
        third = await there.create(spec=private(there, 7.5))  # the second was charged nothing
        assert third.quote.privacy.spent_epsilon == 2.5


async def test_two_jobs_at_once_do_not_both_get_the_last_of_a_budget(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, privacy_epsilon_per_dataset=10.0) as there:
        made = await asyncio.gather(*(there.create(spec=private(there, 4.0)) for _ in range(6)), return_exceptions=True)
        assert sum(isinstance(each, Job) for each in made) == 2
        assert {reason(each) for each in made if isinstance(each, grpc.aio.AioRpcError)} == {"PRIVACY_BUDGET_EXCEEDED"}


async def test_persons_are_not_protected_where_no_row_says_whose_it_is(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await there.create(spec=private(there, 4.0, unit=pb.PRIVACY_UNIT_USER))
        assert info_of(error.value)["rule"] == "no_user_column"
