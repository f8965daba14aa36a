"""What validating many rows takes: rows a second, and the validator's memory as they go by.

    python -m benchmarks.dataset_rows --rows 10000000

The rows are made on the way to disk, unlike each other but for one exact repeat in a thousand; the validator is the process that the
service starts, with its bound on memory, without a tokenizer. Memory is its resident size, looked at ten times a second.
"""

import argparse
import asyncio
import hashlib
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import record, upload
from services.finetune.hosts import ProcessHost
from services.finetune.rows import Layout
from services.finetune.validation import Outcome, Task

MEMORY_BYTES = 2 << 30  # as ARGOSY_VALIDATOR_MEMORY_BYTES
REPEATED = 1_000  # of so many rows one repeats an earlier one
WORDS = tuple(word.encode() for word in upload.WORDS)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the bytes judged, at which memory is told


def write(path: Path, rows: int) -> str:
    """Rows into a file; its SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for first in range(0, rows, 10_000):
            places = range(first, min(rows, first + 10_000))
            data = b"".join(_row(at) for at in places)
            digest.update(data)
            out.write(data)
    return digest.hexdigest()


def _row(at: int) -> bytes:
    number = at if at % REPEATED else 0
    first, second, third = (WORDS[number * factor % len(WORDS)] for factor in (1, 7, 11))
    return b'{"text":"The %s of %s %d and its %s","label":"topic %d"}\n' % (first, second, number, third, number % 4)


async def measured(folder: Path, rows: int) -> list[tuple[object, ...]]:
    """One validation."""
    data = folder / "datasets" / "p" / "d" / "v" / "data"
    data.parent.mkdir(parents=True)
    sha256 = await asyncio.to_thread(write, data, rows)
    total = data.stat().st_size
    task = Task(
        store_url=f"file://{folder}", data="datasets/p/d/v/data", sha256=sha256, total_bytes=total, layout=Layout("classify"),
        digests="datasets/p/d/v/digests", memory_bytes=MEMORY_BYTES,
    )  # fmt: skip
    done, seen, most = 0, dict[float, float](), 0.0
    began = time.monotonic()

    async def progress(judged: int) -> bool:
        nonlocal done
        done = judged
        return True

    async def watch() -> None:
        nonlocal most
        while True:
            await asyncio.sleep(0.1)
            for child in psutil.Process().children():
                size = child.memory_info().rss / 2**20
                most = max(most, size)
                for share in SHARES:
                    if done >= share * total and share not in seen:
                        seen[share] = size

    watching = asyncio.create_task(watch())
    outcome = await ProcessHost()(task, progress)
    watching.cancel()
    seconds = time.monotonic() - began
    assert isinstance(outcome, Outcome) and outcome.rows == rows and outcome.errors == 0
    found: list[tuple[object, ...]] = [("what", "got")]
    found += [
        ("rows", f"{rows:,}"),
        ("MiB", f"{total / 2**20:,.0f}"),
        ("seconds", f"{seconds:,.0f}"),
        ("rows a second", f"{rows / seconds:,.0f}"),
    ]
    found += [(f"MiB at {share:.0%} of the bytes", f"{size:,.0f}") for share, size in sorted(seen.items())]
    return [
        *found,
        ("MiB at most, finding repeats included", f"{most:,.0f}"),
        ("exact repeats found", f"{outcome.summary.duplicate_rows:,}"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    asked = parser.parse_args()
    record.header()
    with tempfile.TemporaryDirectory(prefix="argosy-rows-") as folder:
        record.table(*asyncio.run(measured(Path(folder), asked.rows)))


if __name__ == "__main__":
    main()
