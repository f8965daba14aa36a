"""What runs where: tensors in the engines' processes, and nothing of them in the process that answers the wire."""

from pathlib import Path

import psutil

from tests.fleet.running import Fleet


def _libraries(process: psutil.Process) -> set[str]:
    return {Path(mapped.path).name for mapped in process.memory_maps()}


def test_the_process_that_answers_the_wire_has_loaded_no_torch(tiny: Fleet) -> None:
    wire = _libraries(psutil.Process(tiny.process.pid))
    assert not {name for name in wire if "torch" in name}
    engines = tiny.engines()
    assert len(engines) == 3
    assert all({name for name in _libraries(engine) if name.startswith("libtorch")} for engine in engines), "the test can see"
