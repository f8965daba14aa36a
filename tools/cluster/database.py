"""The cluster's PostgreSQL: the embedded one of the fleet, on an address that pods reach.

`python -m tools.cluster.database FOLDER ADDRESS` serves until it is told to end, and writes its URL to FOLDER/url when it is up.
"""

import asyncio
import os
import signal
import sys
from pathlib import Path

from services.postgres import DATABASE, USER, embedded_postgres

PORT = 5432


async def serve(folder: Path, address: str) -> None:
    """Run the server until SIGTERM; whoever dials by TCP must know the password, which is in the URL."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = folder / "pg_hba.conf"
    rules.write_text("local all all scram-sha-256\nhost all all 10.0.0.0/8 scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n")
    rules.chmod(0o644)
    folder.chmod(0o755)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    options = {"listen_addresses": address, "port": str(PORT), "hba_file": str(rules), "fsync": "off", "max_connections": "200"}
    async with embedded_postgres(folder / "data", options):
        password = (folder / "data" / "password").read_text()
        fresh = folder / "url.new"
        fresh.write_text(f"postgresql://{USER}:{password}@{address}:{PORT}/{DATABASE}")
        os.replace(fresh, folder / "url")
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
