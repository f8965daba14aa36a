"""Objects by path: whole or absent, on disk before they are named, and never outside the root."""

import errno
import os
from collections.abc import AsyncIterator

import pytest

from services.chassis.objects import STREAM_BYTES, ObjectMissing, ObjectsUnavailable, SyncObjects, open_objects, open_objects_sync


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path) -> SyncObjects:
    return open_objects_sync(f"file://{tmp_path}/store" if request.param == "file" else "memory://")


def test_what_is_put_is_read_back_in_every_way(store: SyncObjects) -> None:
    data = bytes(range(256)) * 12_000  # 3 MB: more than one piece
    store.put("a/b/data", data)
    assert store.get("a/b/data") == data
    assert store.size("a/b/data") == len(data)
    pieces = list(store.stream("a/b/data", 5))
    assert b"".join(pieces) == data[5:]
    assert max(map(len, pieces)) <= STREAM_BYTES
    assert store.get_range("a/b/data", 100, 50) == data[100:150]
    assert store.get_range("a/b/data", len(data) - 3, 50) == data[-3:]
    assert store.get_range("a/b/data", len(data) + 3, 50) == b""
    assert list(store.stream("a/b/data", len(data))) == []


def test_an_empty_object_exists(store: SyncObjects) -> None:
    store.put("empty", b"")
    assert store.size("empty") == 0
    assert store.get("empty") == b""


def test_put_replaces_and_copy_copies(store: SyncObjects) -> None:
    store.put("x", b"one")
    store.put("x", b"two")
    store.copy("x", "y/z")
    assert (store.get("x"), store.get("y/z")) == (b"two", b"two")


def test_lists_are_in_order_and_below_whole_segments(store: SyncObjects) -> None:
    for path in ("p/b", "p/a/c", "p/a/b", "pp/other"):
        store.put(path, path.encode())
    assert list(store.list("p")) == [("p/a/b", 5), ("p/a/c", 5), ("p/b", 3)]
    assert list(store.list("p/")) == list(store.list("p"))
    assert list(store.list("nothing")) == []


def test_deletes_may_be_repeated(store: SyncObjects) -> None:
    store.put("p/a", b"1")
    store.put("p/b/c", b"2")
    store.put("q", b"3")
    store.delete("p/a")
    store.delete("p/a")
    assert store.size("p/a") is None
    assert store.delete_prefix("p") == 1
    assert store.delete_prefix("p") == 0
    assert [path for path, _ in store.list("q")] == []
    assert store.get("q") == b"3"


def test_missing_is_missing(store: SyncObjects) -> None:
    for read in (
        store.get,
        lambda path: list(store.stream(path)),
        lambda path: store.get_range(path, 0, 1),
        lambda path: store.copy(path, "z"),
    ):
        with pytest.raises(ObjectMissing):
            read("no/such")
    assert store.size("no/such") is None
    assert store.size("z") is None


def test_an_object_that_fails_halfway_is_absent(store: SyncObjects) -> None:
    store.put("kept", b"before")
    for path in ("new", "kept"):
        with pytest.raises(RuntimeError), store.writing(path) as writer:
            writer.write(b"half")
            raise RuntimeError
    assert store.size("new") is None
    assert store.get("kept") == b"before"
    assert list(store.list("new")) == []


def test_files_go_in_and_come_out_whole(store: SyncObjects, tmp_path) -> None:
    (tmp_path / "in").write_bytes(b"\0" * 3_000_000)
    store.store(tmp_path / "in", "f")
    store.fetch("f", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()
    with pytest.raises(ObjectMissing):
        store.fetch("g", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in", "out"]


@pytest.mark.parametrize(
    "path", ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".", "a/./b", ".tmp-x", "a b", "a\\b", "a\0", "é", "%2e%2e", "C:x", "a" * 129]
)
def test_A15_only_plain_names_are_paths(store: SyncObjects, path: str) -> None:
    for touch in (lambda: store.put(path, b"x"), lambda: store.get(path), lambda: store.size(path), lambda: store.delete(path)):
        with pytest.raises(ValueError, match="not an object path"):
            touch()


def test_A15_links_are_not_followed(tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = open_objects_sync(f"file://{tmp_path}/store")
    store.put("a/file", b"x")
    (tmp_path / "store" / "a" / "link").symlink_to(outside / "secret")
    (tmp_path / "store" / "dir").symlink_to(outside)
    for path in ("a/link", "dir/secret", "a/file/below"):
        with pytest.raises(ObjectMissing):
            store.get(path)
    with pytest.raises(ObjectMissing):
        store.put("dir/new", b"x")
    store.delete_prefix("a")
    assert (outside / "secret").read_bytes() == b"secret"
    assert [entry.name for entry in outside.iterdir()] == ["secret"]


def test_a_full_disk_is_unavailable_and_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    store = open_objects_sync(f"file://{tmp_path}/store")
    store.put("x", b"before")
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 4:
            return write(descriptor, data[:4])  # a short write, then none: as a disk does that fills up
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ObjectsUnavailable) as refused:
        store.put("x", b"after")
    monkeypatch.undo()
    assert (refused.value.code, refused.value.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE")
    assert store.get("x") == b"before"
    assert os.listdir(tmp_path / "store") == ["x"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_name_appears_only_after_its_bytes_are_on_disk(tmp_path, monkeypatch, step: str) -> None:
    store = open_objects_sync(f"file://{tmp_path}/store")

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, step)

    monkeypatch.setattr(os, step, broken)
    with pytest.raises(ObjectsUnavailable):
        store.put("x", b"data")
    monkeypatch.undo()
    assert os.listdir(tmp_path / "store") == []


@pytest.mark.parametrize("url", ["http://host/x", "file://host/x", "file://", "/x", "ftp://x", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="a store is"):
        open_objects_sync(url)


def test_an_unreachable_bucket_is_unavailable(monkeypatch) -> None:
    store = open_objects_sync("memory://")

    class Away:
        def head(self, *_: object) -> None:
            raise OSError("connection refused")

    monkeypatch.setattr(store, "_obstore", Away())
    with pytest.raises(ObjectsUnavailable):
        store.size("x")


async def test_the_loop_side_does_the_same(tmp_path) -> None:
    objects = open_objects(f"file://{tmp_path}/store")

    async def pieces(fail: bool) -> AsyncIterator[bytes]:
        yield b"one"
        if fail:
            raise RuntimeError
        yield b"two"

    await objects.put_stream("a/x", pieces(False))
    with pytest.raises(RuntimeError):
        await objects.put_stream("a/y", pieces(True))
    await objects.put("a/z", b"3")
    await objects.copy("a/z", "b/z")
    assert await objects.get("a/x") == b"onetwo"
    assert await objects.get_range("a/x", 2, 2) == b"et"
    assert [piece async for piece in objects.stream("a/x", 1)] == [b"netwo"]
    assert [found async for found in objects.list("a")] == [("a/x", 6), ("a/z", 1)]
    assert await objects.size("a/y") is None
    await objects.delete("a/x")
    assert await objects.delete_prefix("a") == 1
    with pytest.raises(ObjectMissing):
        await objects.get("a/z")
    with pytest.raises(ObjectMissing):
        _ = [piece async for piece in objects.stream("a/z")]
    objects.close()
