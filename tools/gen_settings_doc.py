"""Write docs/settings.md from the settings' dataclasses, so that the list of variables is the code's own.

A field's comment is its description. `python tools/gen_settings_doc.py` writes; with `--check` it fails where the file differs.
"""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

from services.chassis.server import Listener
from services.chassis.telemetry import TelemetrySettings
from services.finetune.settings import FineTuneSettings
from services.fleet import FleetSettings
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings
from services.inference.settings import InferenceSettings

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Every service reads its settings from environment variables when it starts, reports all wrong ones at once and exits with 2. This file is
made from the code by tools/gen_settings_doc.py. `OTEL_EXPORTER_OTLP_ENDPOINT` (OpenTelemetry's own variable) names a collector for traces
and metrics over HTTP. The Python client and the command line read `ARGOSY_ADDRESS`, `ARGOSY_API_KEY`, `ARGOSY_CA` and, the command line
alone, `ARGOSY_DEFAULT_MODEL`.
"""
SECTIONS: tuple[tuple[str, tuple[type[Any], ...]], ...] = (
    ("Every server", (Listener, TelemetrySettings)),
    ("Gateway", (GatewaySettings, StoreSettings, LedgerSettings)),
    ("Inference", (InferenceSettings,)),
    ("Fine-tuning", (FineTuneSettings,)),
    ("The fleet in one process: all of the above, and", (FleetSettings,)),
)
FIELD = re.compile(r"    (?P<name>[a-z_0-9]+): (?P<rest>.*)")


def comments(kind: type[Any]) -> dict[str, str]:
    """Each field's comment: on its line, or alone on the lines above it."""
    found, above = {}, ""
    for line in inspect.getsource(kind).splitlines():
        code, _, comment = line.partition("  # ")
        if line.strip().startswith("# "):
            above = f"{above} {line.strip()[2:]}".strip()
            continue
        if match := FIELD.fullmatch(code.rstrip()):
            found[match["name"]] = comment or above
        above = ""
    return found


def kind_of(hint: Any) -> str:
    """A type as an operator reads it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    text = text.replace("pathlib.", "").replace("typing.", "").replace(" | None", "").replace("tuple[str, ...]", "list, with commas")
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "Path": "path"}.get(text, text)


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default in words; what is decided at start is not a constant."""
    if field.default is dataclasses.MISSING:
        return "in the user's folder"
    if field.default in (None, "", ()):
        return "–"
    if isinstance(field.default, tuple):
        return f"`{','.join(map(str, field.default))}`"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def made() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, kinds in SECTIONS:
        lines += [f"## {title}", "", "| Variable | Value | Default | Meaning |", "|---|---|---|---|"]
        for kind in kinds:
            lines += rows(kind)
        lines.append("")
    return "\n".join(lines)


def rows(kind: type[Any]) -> list[str]:
    """A row for each variable; nested settings are flattened, the shared ones left to their own section."""
    said, hints, found = comments(kind), typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += [] if hint in (Listener, TelemetrySettings) else rows(typing.cast(type[Any], hint))
            continue
        meaning = said.get(field.name, "").replace("|", "\\|")
        found.append(f"| `ARGOSY_{field.name.upper()}` | {kind_of(hint)} | {default_of(field)} | {meaning[:1].upper()}{meaning[1:]} |")
    return found


def main() -> None:
    """Write the page, or with `--check` compare it."""
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text() != made():
            sys.exit("docs/settings.md is not what the code says: run `make protos`")
        return
    TARGET.write_text(made())


if __name__ == "__main__":
    main()
