"""What children of the control plane may know of it, and how long they may be silent."""

import asyncio
import os
import sys
from typing import Any

import pytest

from services.finetune import evaluations, hosts
from services.finetune.evaluations import MeasurerDied
from services.finetune.evaluations import ProcessHost as MeasuringHost
from services.finetune.examining import Task
from services.finetune.rows import Layout

SECRETS = {"ARGOSY_DATABASE_URL": "postgresql://u:p@h/d", "ARGOSY_PAGE_TOKEN_KEY": "00" * 32, "ARGOSY_MANIFEST_KEY": "/k.pem"}
STORE = {"AWS_ACCESS_KEY_ID": "a", "GOOGLE_APPLICATION_CREDENTIALS": "/g.json"}


def test_children_open_the_object_store_and_know_no_other_secret() -> None:
    ours = SECRETS | STORE | {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}
    assert hosts.allowed(ours) == STORE | {"PATH": "/bin"}
    assert hosts.allowed(ours, "CUDA_VISIBLE_DEVICES") == STORE | {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}
    assert hosts.credentials(ours) == STORE


async def test_a_measuring_process_gets_no_secret_and_is_given_up_when_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []
    start = asyncio.create_subprocess_exec

    async def silent(*words: str, env: dict[str, str], **options: Any) -> Any:
        given.append(env)
        return await start(sys.executable, "-c", "import time; time.sleep(600)", env=env, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", silent)
    monkeypatch.setattr(evaluations, "SILENT_SECONDS", 0.2)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    async def progress(rows: int) -> bool:
        return True

    task = Task("memory://", "/base", "data", "0" * 64, Layout("chat"), (), None, 1, None)
    with pytest.raises(MeasurerDied):
        await MeasuringHost()(task, progress)
    assert given
    assert not any(name in given[0] for name in SECRETS)
    assert given[0]["PATH"] == os.environ["PATH"]
