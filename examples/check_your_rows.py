"""Every bad row of a file by line, byte offset, field and rule; the rest is usable without them."""

from pathlib import Path
from tempfile import TemporaryDirectory

import argosy
from argosy import errors, tuning

ROWS = (
    b'{"text": "Fine", "label": "good"}\n{"text": "", "label": "bad"}\n{"text": "Broken", "mark": "bad"}\n{"text": "Bad", "label": "bad"}\n'
)

with argosy.Client() as client, TemporaryDirectory() as folder:
    file = Path(folder) / "opinions.jsonl"
    file.write_bytes(ROWS)
    try:
        tuning.prepared(client, file, "classify")
    except errors.DatasetRejected as refused:
        for found in refused.row_errors:
            print(f"line {found.line}, byte {found.byte_offset}: {found.field or 'the row'} breaks {found.rule}")
    clean = tuning.prepared(client, file, "classify", skip_bad_rows=True)
    print(clean.name, "lacks lines", list(clean.skipped_lines))
