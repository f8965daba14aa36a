"""What the books cost: a reservation, a settlement and a key's look-up, on the embedded PostgreSQL with durability on.

python -m benchmarks.ledger
"""

import argparse
import asyncio
import os
import tempfile
import time
from pathlib import Path
from uuid import uuid4

import uvloop
from sqlalchemy import text

from benchmarks.record import header, percentile, table
from services.gateway.keys import PEPPER_BYTES, mint
from services.gateway.ledger import Outcome, Reservation, Settlement
from services.gateway.sql_ledger import LedgerSettings, open_ledger
from services.gateway.store import Store, StoreSettings, open_store
from services.postgres import embedded_postgres


async def a_key(store: Store) -> tuple[str, str]:
    """A project and a key of it, unlimited; their uids."""
    project, minted = str(uuid4()), mint(str(uuid4()), "test", store.pepper)
    async with store.transaction() as connection:
        await connection.execute(
            text("INSERT INTO projects (uid, name, kv_secret) VALUES (:uid, 'measured', :secret)"),
            {"uid": project, "secret": os.urandom(32)},
        )
        await connection.execute(
            text("INSERT INTO api_keys (project_uid, uid, mac, scopes) VALUES (:project, :uid, :mac, '{generate}')"),
            {"project": project, "uid": minted.uid, "mac": minted.mac},
        )
    return project, minted.uid


async def measure(calls: int) -> None:
    """Print a row for each number of callers at once; all are of one project, the worst case for its one row of counters."""
    header()
    rows: list[tuple[object, ...]] = [("callers", "calls/s", "CPU µs/call", "reserve ms", "settle ms", "key ms")]
    with tempfile.TemporaryDirectory() as folder:
        async with (
            embedded_postgres(Path(folder) / "postgres") as url,
            open_store(StoreSettings(database_url=url), os.urandom(PEPPER_BYTES), wait=True) as store,
            open_ledger(store, LedgerSettings(journal_dir=Path(folder) / "journal")) as ledger,
        ):
            project, key = await a_key(store)

            async def call(times: dict[str, list[float]]) -> None:
                r = Reservation(str(uuid4()), str(uuid4()), project, key, "/argosy.v1.GenerationService/Chat", "m", "1", 10, 20, bytes(32))
                start = time.perf_counter()
                await ledger.reserve(r)
                reserved = time.perf_counter()
                await ledger.settle(Settlement(r.generation_id, Outcome.DONE, 10, 4, 5, 0, "r-1"))
                settled = time.perf_counter()
                await store.key(key)
                ended = time.perf_counter()
                for name, seconds in zip(times, (reserved - start, settled - reserved, ended - settled), strict=True):
                    times[name].append(seconds)

            async def caller(count: int, times: dict[str, list[float]]) -> None:
                for _ in range(count):
                    await call(times)

            await caller(100, {"reserve": [], "settle": [], "key": []})  # prepares the statements
            for callers in (1, 8, 32):
                times: dict[str, list[float]] = {"reserve": [], "settle": [], "key": []}
                start, cpu = time.perf_counter(), time.process_time()
                await asyncio.gather(*(caller(calls // callers, times) for _ in range(callers)))
                seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
                done = len(times["key"])
                shown = (f"{percentile(t, 0.5) * 1e3:.2f} / {percentile(t, 0.99) * 1e3:.2f}" for t in times.values())
                rows.append((callers, f"{done / seconds:.0f}", f"{cpu / done * 1e6:.0f}", *shown))
    print("\nLatencies are p50 / p99.\n")
    table(*rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2_000)
    uvloop.run(measure(parser.parse_args().calls))


if __name__ == "__main__":
    main()
