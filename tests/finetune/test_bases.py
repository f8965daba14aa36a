import asyncio

import pytest

from services.chassis.errors import NotStarted, ResourceNotFound
from services.finetune.bases import Bases
from tests.finetune.trainer import world


async def test_a_base_is_read_once_for_all_who_ask(tmp_path) -> None:
    world.base(tmp_path / "tiny")
    bases = Bases([f"tiny={tmp_path / 'tiny'}"], str(tmp_path / "cache"))
    first, second = await asyncio.gather(bases.get("models/tiny"), bases.get("models/tiny"))
    assert first is second
    assert (len(first.digest), first.width) == (64, first.modules["model.layers.0.self_attn.q_proj"][1])
    assert {path.rpartition(".")[2] for path in first.modules} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(".layers." in path for path in first.modules)


async def test_an_unknown_base_is_not_found_and_one_that_cannot_be_had_may_come_back(tmp_path) -> None:
    bases = Bases([f"tiny={tmp_path / 'tiny'}"], str(tmp_path / "cache"))
    assert bases.names == {"models/tiny"}
    with pytest.raises(ResourceNotFound):
        await bases.get("models/other")
    with pytest.raises(NotStarted):
        await bases.get("models/tiny")
    world.base(tmp_path / "tiny")
    assert (await bases.get("models/tiny")).digest


def test_an_entry_of_another_form_is_refused() -> None:
    for entry in ("tiny", "=x", "tiny="):
        with pytest.raises(ValueError):
            Bases([entry])
