"""`argosy datasets`: the rows that were sent, and what was found in them."""

from typing import Annotated

import typer
from rich.table import Table

from argosy import names
from argosy.cli import tables
from argosy.cli.live import moment
from argosy.cli.session import app, chosen, fleet, out, show_json
from argosy.v1 import dataset_pb2

group = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="Datasets of your project.")
app.add_typer(group, name="datasets")
VersionArgument = Annotated[str, typer.Argument(help="a version, as headlines/1")]


@group.callback()
def datasets(ctx: typer.Context) -> None:
    """Datasets of your project."""
    if ctx.invoked_subcommand is None:
        datasets_list()


@group.command("list")
def datasets_list() -> None:
    """All of them."""
    with fleet(model=False) as client:
        found = list(client.datasets.list())
    if chosen.json:
        for dataset in found:
            show_json(dataset)
        return
    table = Table("dataset", "format", "newest version", "created")
    for dataset in found:
        shape = dataset_pb2.DatasetFormat.Name(dataset.format).removeprefix("DATASET_FORMAT_").lower()
        table.add_row(names.last(dataset.name), shape, names.last(dataset.latest_version), moment(dataset.create_time))
    out.print(table)


@group.command("show")
def datasets_show(dataset: Annotated[str, typer.Argument(help="a dataset, as headlines, or a version, as headlines/1")]) -> None:
    """A dataset's versions, or one version's report."""
    with fleet(model=False) as client:
        try:
            name = names.version(client.project(), "datasets", dataset)
        except ValueError:
            found = list(client.datasets.versions(dataset))
            if chosen.json:
                for version in found:
                    show_json(version)
                return
            table = Table("version", "state", "rows", "errors", "warnings", "bytes", "sha256")
            for version in found:
                told = version.report
                state = dataset_pb2.DatasetVersion.State.Name(version.state).removeprefix("STATE_")
                counts = (f"{each:,}" for each in (told.rows, told.errors, told.warnings, version.total_bytes))
                table.add_row(names.last(version.name), state, *counts, version.sha256[:12])
            out.print(table)
            return
        version = client.datasets.version(name)
    if chosen.json:
        show_json(version)
    else:
        tables.report(version)


@group.command("errors")
def datasets_errors(
    version: VersionArgument,
    errors_only: Annotated[bool, typer.Option("--errors-only", help="leave warnings out")] = False,
) -> None:
    """What was found, by line, byte offset, field and rule."""
    with fleet(model=False) as client:
        found = list(client.datasets.row_errors(version, errors_only=errors_only))
    if chosen.json:
        for each in found:
            show_json(each)
    elif found:
        tables.findings(found, most=1_000)
    else:
        out.print("nothing was found")


@group.command("redact")
def datasets_redact(
    version: VersionArgument,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="email, phone, …; repeat it; default: all that were found")] = None,
) -> None:
    """A new version without the personal data found in this one."""
    with fleet(model=False) as client:
        made = client.datasets.wait(client.datasets.redact(version, kind or ()).name)
    if chosen.json:
        show_json(made)
    else:
        tables.report(made)


@group.command("delete")
def datasets_delete(
    dataset: Annotated[str, typer.Argument(help="a dataset, as headlines, or a version, as headlines/1")],
    cascade: Annotated[bool, typer.Option("--cascade", help="with the jobs and models made from it")] = False,
) -> None:
    """Erase a dataset or a version."""
    with fleet(model=False) as client:
        told = client.datasets.delete(dataset, cascade=cascade)
    if chosen.json:
        show_json(told)
    else:
        tables.deletion(told)
