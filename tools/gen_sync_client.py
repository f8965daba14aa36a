"""Make the blocking client from the asyncio one, so that neither is written twice by hand.

`python tools/gen_sync_client.py` writes client.py, datasets.py, jobs.py, registry.py and tuning.py in clients/python/argosy; with
`--check` it fails where one differs.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "clients" / "python" / "argosy"
HEADER = '"""The blocking {name}. Made from {source} by tools/gen_sync_client.py: edit that file, then run `make protos`.\n'
MADE = {
    "aio.py": "client.py",
    "aio_datasets.py": "datasets.py",
    "aio_jobs.py": "jobs.py",
    "aio_registry.py": "registry.py",
    "aio_tuning.py": "tuning.py",
}
WORDS = (
    (r"`client\.py` is made from this file by tools/gen_sync_client\.py: edit here, then run `make protos`\.\n\n", ""),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsync(Client|GenerationStream|Datasets|Jobs|Registry|Tuning)\b", r"\1"),
    (r"\bargosy\.aio\b", "argosy.client"),
    (r"\baio_(datasets|jobs|registry|tuning)\b", r"\1"),
    (r"\basyncio\.to_thread\(([\w.]+), ", r"\1("),
    (r"\basyncio\.to_thread\(([\w.]+)\)", r"\1()"),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"^import asyncio$", "import time"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAwaitable, ", ""),
    (r"__a(enter|exit|iter)__", r"__\1__"),
    (r"\baclose\b", "close"),
    (r"\bopen_aio\b", "open"),
    (r"\bclose\(None\)", "close()"),
)


def made(source: str) -> str:
    """The text of the blocking module that a source makes, formatted."""
    target = MADE[source]
    text = (HERE / source).read_text().split("\n", 1)[1]
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    text = HEADER.format(name=target.removesuffix(".py"), source=source) + text
    for command in (("check", "--fix-only", "--unsafe-fixes", "--select", "I,UP028,F401,F811", "--quiet"), ("format", "--quiet")):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(HERE / target), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


def main() -> None:
    """Write the files, or with `--check` compare them."""
    for source, target in MADE.items():
        if "--check" not in sys.argv[1:]:
            (HERE / target).write_text(made(source))
        elif (HERE / target).read_text() != made(source):
            sys.exit(f"clients/python/argosy/{target} is not what {source} makes: run `make protos`")


if __name__ == "__main__":
    main()
