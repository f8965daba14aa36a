"""The journal: on the disk before it is acknowledged, whole lines only, bounded."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from services.gateway.journal import Entry, Journal, JournalBroken, JournalFull, Segment, read
from tests.gateway.books import a_reservation, a_settlement

R = a_reservation("00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b")
SETTLED = Entry(R, a_settlement(R))


async def everything(journal: Journal) -> list[Entry]:
    return [entry for segment in await journal.seal() for entry in read(segment)]


async def test_entries_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.append([Entry(R)])
    await asyncio.gather(*(journal.append([replace_(n)]) for n in range(50)))
    found = await everything(journal)
    assert found[0] == Entry(R)
    assert sorted(entry.reservation.input_tokens for entry in found[1:]) == list(range(50))
    await journal.close()


def replace_(n: int) -> Entry:
    return Entry(replace(R, input_tokens=n), a_settlement(R))


async def test_F18_each_append_is_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        fsync(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fsync", noted)
    journal = Journal(tmp_path)
    await journal.append([SETTLED])
    (path,) = tmp_path.iterdir()
    assert synced[-1] == path.stat().st_size
    await journal.close()


@pytest.mark.parametrize("cut", [1, 5, 100])
async def test_F18_torn_line_is_dropped(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path)
    await journal.append([SETTLED])
    await journal.append([Entry(R)])
    await journal.close()
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - cut)
    assert read(Segment(path, own=False)) == [SETTLED]


async def test_F18_flipped_bit_ends_the_reading(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.append([SETTLED])
    await journal.append([SETTLED])
    await journal.close()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[len(data) - 30] ^= 1
    path.write_bytes(data)
    assert read(Segment(path, own=False)) == [SETTLED]


async def test_bound_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_bytes=4_096)
    with pytest.raises(JournalFull):
        for _ in range(100):
            await journal.append([SETTLED])
    held = len(await everything(journal))
    assert held
    with pytest.raises(JournalFull):  # sealing does not make room, applying does
        for _ in range(held):
            await journal.append([SETTLED])
    for segment in await journal.seal():
        journal.drop(segment)
    await journal.append([SETTLED])
    await journal.close()


async def test_F17_failed_sync_is_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)

    def fails(fd: int) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(JournalBroken):
        await journal.append([SETTLED])
    monkeypatch.undo()
    with pytest.raises(JournalBroken):  # not even if the disk seems well again
        await journal.append([SETTLED])
    await journal.close()


async def test_living_neighbours_segment_is_left_alone(tmp_path: Path) -> None:
    one, other = Journal(tmp_path), Journal(tmp_path)
    await one.append([SETTLED])
    assert await everything(other) == []
    await one.close()
    (segment,) = await other.seal()
    assert not segment.own
    assert read(segment) == [SETTLED]
    other.drop(segment)
    assert list(tmp_path.iterdir()) == []
    await other.close()


async def test_appending_goes_on_while_a_segment_is_replayed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.append([Entry(R)])
    (segment,) = await journal.seal()
    await journal.append([SETTLED])
    journal.drop(segment)
    assert journal.holds_any
    assert await everything(journal) == [SETTLED]
    await journal.close()
