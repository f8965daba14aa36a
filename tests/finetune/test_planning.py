"""What a job would be: chosen values, its quote, and whether the day has room for it."""

from dataclasses import dataclass, replace

import pytest

from argosy.v1 import finetune_pb2 as pb
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ModelCapability, QuotaExceeded
from services.chassis.identity import Caller
from services.finetune import events, planning, quotes
from services.finetune.datasets import TrainingVersion
from services.finetune.rows import Layout
from services.finetune.trainer.control import Warned

WHO = Caller("u", "p", "k", frozenset(), "r", "")
ROWS = TrainingVersion(
    name="projects/p/datasets/d/versions/1", uid="v", dataset_uid="d", path="data", digests_path="digests", sha256="a" * 64,
    total_bytes=30_000, layout=Layout("classify"), rows=100, labels={"a": 50, "b": 50}, tokens={"models/m": 5_000},
    longest={"models/m": 90},
)  # fmt: skip


@dataclass
class Base:
    context: int = 1_024
    weights: int = 270_000_000


def spec(**fields: object) -> pb.FineTuneSpec:
    return pb.FineTuneSpec(**({"base_model": "models/m", "method": pb.TUNE_METHOD_CLASSIFY} | fields))  # type: ignore[arg-type]


def test_every_value_is_chosen_and_what_was_asked_stays() -> None:
    asked = spec(lora=pb.Lora(rank=4), hyperparameters=pb.Hyperparameters(epochs=2.0), seed=7)
    made, size = planning.resolved(asked, Base(), ROWS, None)
    assert (made.lora.rank, made.lora.alpha, made.seed, made.packing) == (4, 8.0, 7, True)
    assert (made.seq_len, made.validation_fraction) == (256, 0.1)  # 90 tokens and room for the template, a power of two
    own = made.hyperparameters
    assert (own.epochs, own.batch_size, own.learning_rate) == (2.0, quotes.BATCH["CLASSIFY"], quotes.LEARNING_RATE["CLASSIFY"])
    assert (size.rows, size.steps, made.early_stopping.patience) == (90, 12, quotes.PATIENCE)
    assert asked.WhichOneof("adapter") == "lora" and not asked.HasField("seq_len")  # the asked spec is left alone


def test_a_private_job_is_small_unpacked_and_never_stopped_by_its_rows() -> None:
    made, _ = planning.resolved(spec(privacy=pb.Privacy(epsilon=8.0)), Base(), ROWS, None)
    assert (made.lora.rank, list(made.lora.targets), made.packing) == (8, ["q_proj", "v_proj"], False)
    assert made.privacy.delta == pytest.approx(1 / 1_000)
    assert not made.HasField("early_stopping")


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (spec(full=pb.FullTune()), ModelCapability),
        (spec(full=pb.FullTune(), privacy=pb.Privacy(epsilon=1.0)), FieldInvalid),
        (spec(seq_len=2_048), FieldOutOfRange),
    ],
)
def test_what_cannot_be_is_refused(asked: pb.FineTuneSpec, error: type[Exception]) -> None:
    with pytest.raises(error):
        planning.resolved(asked, Base(), ROWS, None)


def test_a_quote_is_an_interval_narrower_once_the_speed_is_known() -> None:
    made, size = planning.resolved(spec(), Base(), ROWS, None)
    wide = planning.quote(made, Base(), size, quotes.rate(None, 270_000_000), 1_000, "EUR", "cpu")
    narrow = planning.quote(made, Base(), size, quotes.rate(250.0, 270_000_000), 1_000, "EUR", "cpu")
    assert wide.device_seconds.low < narrow.device_seconds.low < narrow.device_seconds.high < wide.device_seconds.high
    assert (wide.low_cost.currency_code, wide.device) == ("EUR", "cpu")
    assert wide.low_cost.nanos == int(wide.device_seconds.low * 1_000)


@pytest.mark.parametrize(
    ("left", "subject"),
    [
        ({}, ""),
        ({"job_nanos_left": 100, "job_seconds_left": 10}, ""),  # just enough
        ({"job_nanos_left": 99}, "cost_per_day"),
        ({"job_seconds_left": 9}, "gpu_seconds_per_day"),
    ],
)
def test_A28_the_day_has_room_or_it_has_not(left: dict[str, int], subject: str) -> None:
    who = replace(WHO, **left)  # type: ignore[arg-type]
    if not subject:
        planning.affordable(who, 100, 10.0)
        return
    with pytest.raises(QuotaExceeded) as error:
        planning.affordable(who, 100, 10.0)
    assert error.value.metadata["subject"] == subject


@pytest.mark.parametrize("left", [{"job_nanos_left": 0}, {"job_seconds_left": 0}])
def test_a_day_that_is_used_up_starts_nothing_even_for_free(left: dict[str, int]) -> None:
    with pytest.raises(QuotaExceeded):
        planning.affordable(replace(WHO, **left))  # type: ignore[arg-type]


@pytest.mark.parametrize("warned", [Warned("early.stopped"), Warned("V7.label_not_in_train"), Warned("V9.too_long")])
def test_what_a_trainer_warns_of_has_a_sentence(warned: Warned) -> None:
    assert events.warning(warned.rule, warned.line, warned.count).warning.message.endswith(".")


@pytest.mark.parametrize(
    ("limit", "price", "charged", "left"),
    [
        (None, 2, (0, 0.0), (100, 50.0)),
        (None, 2, (30, 15.0), (70, 35.0)),
        (40, 2, (30, 15.0), (10, 5.0)),  # its own limit is nearer
        (400, 2, (0, 0.0), (100, 50.0)),
        (None, 2, (120, 60.0), (0, 0.0)),  # over its quote: the charges tell of it
        (40, 0, (0, 0.0), (40, 50.0)),  # free: money bounds no time
    ],
)
def test_A28_a_job_holds_what_it_may_still_take(limit: int | None, price: int, charged: tuple[int, float], left: tuple[int, float]) -> None:
    quote = pb.Quote(high_cost={"nanos": 100}, device_seconds={"low": 5.0, "high": 50.0})
    assert planning.held(quote, limit, price, *charged) == left
