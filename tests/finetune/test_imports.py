import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from services.chassis.errors import ArtifactRejected, ChecksumMismatch, FieldInvalid
from services.finetune import importing, imports
from services.finetune.importing import CONFIG, HEAD, WEIGHTS, Arriving
from services.finetune.tensors import Refused
from tests.finetune import zoo
from tests.finetune.adapters import lora

GOOD = list(zoo.good())
BAD = [case.name for case in zoo.bad(Path("never"))]


def test_the_zoo_is_as_large_as_it_must_be() -> None:
    """C11: at least 60 malicious and 20 good ones, no two alike."""
    assert len(set(BAD)) == len(BAD) >= 60
    assert len({case.name for case in GOOD}) == len(GOOD) >= 20


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_T13_a_good_adapter_is_taken_and_written_anew(case: zoo.Case, tmp_path: Path) -> None:
    case.put(tmp_path)
    checked = imports.check_files(tmp_path, case.order)
    said = json.loads(case.config)
    assert (checked.rank, checked.alpha, checked.targets) == (said["r"], said["lora_alpha"], tuple(sorted(said["target_modules"])))
    before, after = (
        load_file(tmp_path / "weights.safetensors") if b'"BF16"' not in case.weights else {},
        load_file(tmp_path / "adapter.safetensors"),
    )
    assert all(value.dtype == np.float32 for value in after.values())
    assert list(after) == sorted(after)
    for name, value in before.items():
        kept = after[name + ".weight" if name.endswith("_vector") else name]
        assert np.array_equal(kept.reshape(-1), value.astype(np.float32).reshape(-1))
    assert (tmp_path / "head.out").exists() == bool(case.order.labels)


@pytest.mark.parametrize("name", BAD)
def test_T13_A16_a_bad_adapter_is_refused_for_its_reason(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (case,) = [case for case in zoo.bad(canary) if case.name == name]
    case.put(tmp_path)
    with pytest.raises(Refused) as caught:
        imports.check_files(tmp_path, case.order)
    assert caught.value.rule == case.rule
    assert not canary.exists()


async def test_A16_the_check_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    for number, case in enumerate((GOOD[0], *[case for case in zoo.bad(tmp_path / "canary") if "pickle" in case.name][:2])):
        folder = tmp_path / str(number)
        folder.mkdir()
        case.put(folder)
        if not case.rule:
            checked = await importing.check(folder, case.order)
            assert (checked.rank, checked.rule) == (2, "")
            assert load_file(folder / "adapter.safetensors").keys() == lora().keys()
            continue
        with pytest.raises(ArtifactRejected) as caught:
            await importing.check(folder, case.order)
        assert caught.value.metadata["rule"] == case.rule
    assert not (tmp_path / "canary").exists()


async def test_A16_a_child_that_dies_or_hangs_is_a_refusal(tmp_path: Path) -> None:
    GOOD[0].put(tmp_path)
    (tmp_path / "weights.safetensors").unlink()  # whatever makes it raise
    with pytest.raises(ArtifactRejected) as caught:
        await importing.check(tmp_path, GOOD[0].order)
    assert caught.value.metadata == {"rule": "parser"}
    os.mkfifo(tmp_path / "weights.safetensors")  # nobody writes: it hangs
    with pytest.raises(ArtifactRejected) as caught:
        await importing.check(tmp_path, GOOD[0].order, seconds=3.0)
    assert caught.value.metadata == {"rule": "parser"}


def test_A16_the_child_is_confined(tmp_path: Path) -> None:
    told = tmp_path / "told"
    pid = os.fork()
    if pid == 0:
        try:
            imports.confine()
            limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0] for name in ("AS", "CPU", "NOFILE", "CORE", "FSIZE")}
            told.write_text(json.dumps(limits))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    limits = json.loads(told.read_text())
    assert limits["AS"] == imports.MEMORY_BYTES
    assert (limits["CPU"], limits["NOFILE"], limits["CORE"]) == (60, 64, 0)
    assert limits["FSIZE"] <= 2 * imports.WEIGHTS_BYTES + (1 << 20)


async def test_parts_come_one_after_the_other_and_whole(tmp_path: Path) -> None:
    arriving = Arriving(tmp_path)
    with pytest.raises(ArtifactRejected) as caught:
        arriving.check_whole()
    assert caught.value.metadata["rule"] == "config.missing"
    await arriving.write(CONFIG, 0, b"{}", True)
    with pytest.raises(FieldInvalid):
        await arriving.write(CONFIG, 1, b"x", True)
    with pytest.raises(ArtifactRejected):
        arriving.check_whole()
    await arriving.write(WEIGHTS, 0, b"ab", True)
    await arriving.write(WEIGHTS, 2, b"cd", True)
    with pytest.raises(ChecksumMismatch):
        await arriving.write(WEIGHTS, 4, b"ef", False)
    with pytest.raises(FieldInvalid):
        await arriving.write(HEAD, 5, b"x", True)
    with pytest.raises(ArtifactRejected) as caught:
        await arriving.write(CONFIG, 0, b"{}", True)
    assert caught.value.metadata["rule"] == "part_order"
    arriving.check_whole()
    assert (tmp_path / WEIGHTS).read_bytes() == b"abcd"


async def test_A16_a_part_over_its_size_is_refused_as_it_arrives(tmp_path: Path) -> None:
    arriving = Arriving(tmp_path)
    await arriving.write(CONFIG, 0, b" " * 65_536, True)
    with pytest.raises(ArtifactRejected) as caught:
        await arriving.write(CONFIG, 65_536, b" ", True)
    assert caught.value.metadata["rule"] == "config.size"
