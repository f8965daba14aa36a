"""Fetching a model into a shared folder: whole and verified or not at all, once, and only what is a model's."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.pretrained import weights
from services.pretrained.prefetch import REFUSED, UNAVAILABLE, Folder, main, open_source, prefetch, wanted
from services.pretrained.weights import ModelRefused, ModelUnavailable


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({"w": np.arange(6, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "README.md").write_text("not wanted")
    return folder


@pytest.fixture
def digest(source: Path, tmp_path: Path) -> str:
    return f"sha256:{weights.digest(source, tmp_path / 'cache')}"


class Counting(Folder):
    """Notes what is fetched, and stops after `most` files."""

    def __init__(self, path: Path, most: int = 99) -> None:
        super().__init__(path)
        self.fetched: list[str] = []
        self._most = most

    def fetch(self, names: list[str], folder: Path) -> None:
        if len(self.fetched) >= self._most:
            raise ModelUnavailable("gone")
        self.fetched += names
        super().fetch(names, folder)


def silent(done: int, total: int, what: str) -> None: ...


def test_it_appears_whole_and_only_what_is_a_models(source: Path, digest: str, tmp_path: Path) -> None:
    target, told = tmp_path / "claim" / "sha256-x", list[tuple[int, int]]()
    prefetch(Folder(source), target, digest, lambda done, total, what: told.append((done, total)))
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in target.iterdir())
    assert weights.prepare(str(target), tmp_path) == target


def test_partial_prefetch_invisible_and_not_fetched_twice(source: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "claim" / "sha256-x"
    first, second = Counting(source, most=2), Counting(source)
    with pytest.raises(ModelUnavailable):
        prefetch(first, target, digest, silent)
    assert not target.exists()
    prefetch(second, target, digest, silent)
    assert sorted(first.fetched + second.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    third = Counting(source)
    prefetch(third, target, digest, silent)
    assert not third.fetched


def test_a_file_cut_short_is_fetched_again(source: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "claim" / "sha256-x"
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"cut")
    prefetch(Folder(source), target, digest, silent)
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_another_models_files_are_refused_and_forgotten(source: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "claim" / "sha256-x"
    (source / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelRefused, match=f"^The files' digest is sha256:[0-9a-f]{{64}}, and {digest} was asked for"):
        prefetch(Folder(source), target, digest, silent)
    assert [path.name for path in target.parent.iterdir()] == [f".{target.name}.lock"]


@pytest.mark.parametrize(
    ("name", "text", "said"), [("config.json", '{"auto_map": {}}', "code of its own"), ("tokenizer.json", None, "no tokenizer")]
)
def test_what_must_not_be_loaded_is_refused(source: Path, tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is None:
        (source / name).unlink()
    else:
        (source / name).write_text(text)
    with pytest.raises(ModelRefused, match=said):
        prefetch(Folder(source), tmp_path / "claim" / "x", "sha256:", silent)
    assert not (tmp_path / "claim" / "x").exists()


def test_a_full_volume_is_said_before_the_first_byte(source: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(source)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    with pytest.raises(ModelUnavailable, match=r"64 MiB are needed on the volume of .*, and 1 MiB are free"):
        prefetch(counting, tmp_path / "claim" / "x", digest, silent)
    assert not counting.fetched


def test_two_at_once_fetch_once(source: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "claim" / "sha256-x"
    target.parent.mkdir()
    counts = [Counting(source), Counting(source)]
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that both wait before either begins
        threads = [threading.Thread(target=prefetch, args=(each, target, digest, silent)) for each in counts]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(each.fetched) for each in counts) == [0, 3]


def test_only_data_at_the_top_is_wanted() -> None:
    assert wanted("model-00001-of-00002.safetensors")
    assert wanted("model.safetensors.index.json")
    assert wanted("chat_template.jinja")
    assert not wanted("original/model.safetensors")
    assert not wanted("modeling_chat.py")
    assert not wanted("pytorch_model.bin")


def test_exit_codes_say_whether_to_try_again(source: Path, digest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "claim" / "sha256-x")
    assert main(["ftp://host/model", target, "--digest", digest]) == UNAVAILABLE
    assert "is not hf://" in capsys.readouterr().err
    assert main([f"file://{tmp_path}/nothing", target, "--digest", digest]) == UNAVAILABLE
    assert main([f"file://{source}", target, "--digest", "sha256:0"]) == REFUSED
    assert main([f"file://{source}", target, "--digest", digest]) == 0
    assert main(["hf://not/asked", target, "--digest", digest, "--wait"]) == 0  # it is there


def test_waiting_ends_with_the_pod(tmp_path: Path) -> None:
    """As the first process of a container would: a signal that is not handled would be ignored there."""
    words = [sys.executable, "-m", "services.pretrained.prefetch", "hf://org/name", str(tmp_path / "x"), "--digest", "sha256:0", "--wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        child.stdout.readline()  # it waits
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait() == 128 + signal.SIGTERM


@contextmanager
def hub(source: Path) -> Iterator[str]:
    """A hub with one model, as much of one as the library asks."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                files = [{"rfilename": each.name, "size": each.stat().st_size} for each in source.iterdir()]
                body = json.dumps({"id": "org/name", "modelId": "org/name", "sha": "0" * 40, "siblings": files}).encode()
            elif not (source / path.rpartition("/")[2]).is_file():
                self.send_error(404)
                return
            else:
                body = (source / path.rpartition("/")[2]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_from_the_hub(source: Path, digest: str, tmp_path: Path) -> None:
    target = tmp_path / "claim" / "sha256-x"
    with hub(source) as address:
        words = [sys.executable, "-m", "services.pretrained.prefetch", "hf://org/name", str(target), "--digest", digest]
        done = subprocess.run(
            words,
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_from_a_bucket(source: Path, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.store import LocalStore, from_url

    monkeypatch.setattr("obstore.store.from_url", lambda url: LocalStore(source) if url == "s3://bucket/chat" else from_url(url))
    target = tmp_path / "claim" / "sha256-x"
    prefetch(open_source("s3://bucket/chat"), target, digest, silent)
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
