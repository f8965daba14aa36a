"""`argosy tune`: a file of rows becomes a model that the fleet serves."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from argosy import names, specs, tuning
from argosy.cli import tables
from argosy.cli.jobs import follow
from argosy.cli.session import app, chosen, err, fleet, out, show_messages
from argosy.client import Client
from argosy.errors import DatasetRejected
from argosy.v1 import dataset_pb2, finetune_pb2

_MOST = 64  # uploads that broke off and are remembered


def uploads_file() -> Path:
    """Where uploads that broke off are remembered, so that the next run goes on with them."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "argosy" / "uploads.json"


class Remembered:
    """The upload of one file as it is now, if an earlier run began it."""

    def __init__(self, file: Path, dataset: str) -> None:
        seen = file.stat()
        self._key = "|".join((chosen.address or "", dataset, str(file.resolve()), str(seen.st_size), str(seen.st_mtime_ns)))

    def _all(self) -> dict[str, str]:
        try:
            found = json.loads(uploads_file().read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def upload(self) -> str:
        """Its resource name, empty for none."""
        return self._all().get(self._key, "")

    def keep(self, upload: str) -> None:
        """Remember it."""
        self._write({**self._all(), self._key: upload})

    def forget(self) -> None:
        """It is a version now."""
        self._write({key: name for key, name in self._all().items() if key != self._key})

    def _write(self, uploads: dict[str, str]) -> None:
        path = uploads_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(dict(list(uploads.items())[-_MOST:])))
        partial.replace(path)


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for what is sent and one for what is checked; none where nobody looks."""
    if chosen.json or not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:>8}"), BarColumn(48), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        made: dict[str, TaskID] = {}

        def sent(what: str, done: int, total: int) -> None:
            if what not in made:
                made[what] = progress.add_task(what, total=total)
            progress.update(made[what], completed=done, total=total)

        yield sent


def rows(client: Client, file: Path, method: str, dataset: str, **how: Any) -> dataset_pb2.DatasetVersion:
    """A file as a READY version, with bars, going on where an earlier run broke off; a rejected one is shown with its findings."""
    dataset = dataset or names.segment(file)
    remembered = Remembered(file, dataset)
    try:
        with bars() as sent:
            version = tuning.prepared(
                client, file, method, dataset=dataset, sent=sent, resume=remembered.upload, opened=remembered.keep, **how
            )
    except DatasetRejected as rejected:
        remembered.forget()
        if chosen.json:
            show_messages(dataset_version=rejected.version)
        else:
            tables.report(rejected.version)
            tables.findings(rejected.row_errors)
        raise
    remembered.forget()
    if chosen.json:
        show_messages(dataset_version=version)
    else:
        tables.report(version)
    return version


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="rows: .jsonl, .csv or .tsv")],
    base: Annotated[str, typer.Option("--base", "-b", help="what to start from, as gemma-3-270m")],
    method: Annotated[str, typer.Option("--method", help="classify, chat or preference")],
    model: Annotated[str, typer.Option("--model", help="own model that gets the version; default: called like the file")] = "",
    text_column: Annotated[list[str] | None, typer.Option("--text-column", help="repeat it to join several; default: text")] = None,
    label_column: Annotated[str, typer.Option("--label-column", help="default: label")] = "",
    delimiter: Annotated[str, typer.Option("--delimiter", help="of columns; default: by the file's suffix")] = "",
    header: Annotated[bool | None, typer.Option("--header/--no-header", help="the first line names the columns; default: yes")] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", exists=True, dir_okay=False, help="rows to measure on; default: a tenth is kept back")
    ] = None,
    dataset: Annotated[str, typer.Option("--dataset", help="where the rows are kept; default: called like the file")] = "",
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="leave them out instead of refusing the file")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="of LoRA; default: 16")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="of LoRA; default: twice the rank")] = None,
    dora: Annotated[bool | None, typer.Option("--dora/--no-dora", help="learn magnitude and direction apart")] = None,
    full: Annotated[bool, typer.Option("--full", help="learn every weight")] = False,
    epochs: Annotated[float | None, typer.Option("--epochs", help="passes over the rows; default: 3")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="optimizer steps at most")] = None,
    learning_rate: Annotated[float | None, typer.Option("--learning-rate", help="default: chosen for the base")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="rows of a step; default: chosen")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="tokens of the longest row; default: chosen")] = None,
    patience: Annotated[int | None, typer.Option("--patience", help="evaluations without gain that end it; default: 3")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="same seed, same model; default: drawn")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="train privately within this budget")] = None,
    max_cost: Annotated[str | None, typer.Option("--max-cost", help="pause there: 2.50, or 2.50 EUR")] = None,
    deadline_minutes: Annotated[float | None, typer.Option("--deadline-minutes", help="fail if it has not ended by then")] = None,
    quote: Annotated[bool, typer.Option("--quote", help="upload, check and quote, and train nothing")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job to its end")] = True,
) -> None:
    """Tune a base on a file of rows, and serve the result."""
    how = {
        "text_columns": text_column or (),
        "label_column": label_column,
        "delimiter": delimiter,
        "header": header,
        "skip_bad_rows": skip_bad_rows,
    }
    choices: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "dora": dora,
        "full": full,
        "epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "patience": patience,
        "seed": seed,
        "epsilon": epsilon,
    }
    with fleet(model=False) as client:
        specs.spec(base, "", method, **choices)  # what is wrong here shows before a byte is sent
        limit = None if max_cost is None else specs.cost(max_cost)
        train = rows(client, file, method, dataset, **how)
        measured = rows(client, held_out, method, "", **how).name if held_out else ""
        asked = specs.spec(base, train.name, method, validation_version=measured, **choices)
        target = model or names.segment(file)
        deadline_s = deadline_minutes * 60 if deadline_minutes else None
        job = client.jobs.create(asked, target, max_cost=limit, deadline_s=deadline_s, quote_only=quote)
        if chosen.json:
            show_messages(job=job)
        else:
            tables.quote(job)
        if quote:
            return
        _queued(job)
        if wait:
            follow(client, job.name)


def _queued(job: finetune_pb2.FineTuneJob) -> None:
    if not chosen.json:
        out.print(f"queued as {names.last(job.name)}: argosy jobs watch {names.last(job.name)}", style="dim", markup=False, soft_wrap=True)
