"""Make the blocking client from the asyncio one, so that neither is written twice by hand.

`python tools/gen_sync_client.py` writes clients/python/argosy/client.py; with `--check` it fails where the file differs.
"""

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent / "clients" / "python" / "argosy"
HEADER = '"""The blocking client. Made from aio.py by tools/gen_sync_client.py: edit that file, then run `make protos`.\n'
WORDS = (
    (r"`client\.py` is made from this file by tools/gen_sync_client\.py: edit here, then run `make protos`\.\n\n", ""),
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAsyncClient\b", "Client"),
    (r"\bAsyncGenerationStream\b", "GenerationStream"),
    (r"\bAsyncIterator\b", "Iterator"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"\bAwaitable, ", ""),
    (r"__a(enter|exit|iter)__", r"__\1__"),
    (r"\baclose\b", "close"),
    (r"\bopen_aio\b", "open"),
    (r"\bclose\(None\)", "close()"),
)


def made() -> str:
    """The blocking client's text, formatted."""
    text = HEADER + (HERE / "aio.py").read_text().split("\n", 1)[1]
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    for command in (("check", "--fix-only", "--unsafe-fixes", "--select", "I,UP028", "--quiet"), ("format", "--quiet")):
        text = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(HERE / "client.py"), "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return text


def main() -> None:
    """Write the file, or with `--check` compare it."""
    target = HERE / "client.py"
    if "--check" in sys.argv[1:]:
        if target.read_text() != made():
            sys.exit("clients/python/argosy/client.py is not what aio.py makes: run `make protos`")
        return
    target.write_text(made())


if __name__ == "__main__":
    main()
