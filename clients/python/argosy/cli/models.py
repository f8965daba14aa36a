"""`argosy models`: what the fleet serves, and the project's own versions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from argosy import names
from argosy.cli import tables
from argosy.cli.live import moment
from argosy.cli.session import app, chosen, fleet, out, show_json
from argosy.errors import EvaluationNotPassed
from argosy.v1 import model_pb2

group = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="Models: the shared bases and your own.")
app.add_typer(group, name="models")
ModelArgument = Annotated[str, typer.Argument(help="an own model, as news")]
VersionArgument = Annotated[str, typer.Argument(help="a version, as news/3")]
AliasOption = Annotated[str, typer.Option("--alias", help="the name that callers use")]


@group.callback()
def models(ctx: typer.Context) -> None:
    """Models: the shared bases and your own."""
    if ctx.invoked_subcommand is None:
        models_list()


@group.command("list")
def models_list() -> None:
    """What this fleet serves."""
    with fleet(model=False) as client:
        found = list(client.models())
    if chosen.json:
        for model in found:
            show_json(model)
        return
    table = Table(Column("model", overflow="fold", min_width=24), "base", "context", "can")
    for model in found:
        able = (model_pb2.ModelCapability.Name(each).removeprefix("MODEL_CAPABILITY_").lower() for each in model.capabilities)
        table.add_row(model.name, names.last(model.base_model), f"{model.context_tokens:,}", ", ".join(able))
    out.print(table)


@group.command("show")
def models_show(model: Annotated[str, typer.Argument(help="a model, as news, or a version, as news/3")]) -> None:
    """A model with its aliases, or a version with its metrics."""
    with fleet(model=False) as client:
        try:
            name = names.version(client.project(), "models", model)
        except ValueError:
            found = client.registry.get(model)
            aliases = [] if found.name.startswith("models/") else list(client.registry.aliases(model))
            if chosen.json:
                show_json(found)
                return
            out.print(found.name, style="bold", markup=False)
            for fact in (f"base {found.base_model}", f"answers by {found.default_version}"):
                if not fact.endswith(" "):
                    out.print(fact, markup=False, soft_wrap=True)
            if found.tuned_labels:
                out.print("labels: " + ", ".join(found.tuned_labels), markup=False)
            for alias in aliases:
                tables.alias(alias)
            return
        version = client.registry.version(name)
    if chosen.json:
        show_json(version)
        return
    tables.version(version)
    line = version.lineage
    for what, value in (("job", line.fine_tune_job), ("rows", ", ".join(line.train_versions)), ("adapter", version.adapter_digest)):
        if value:
            out.print(f"{what} {value}", style="dim", markup=False, soft_wrap=True)


@group.command("versions")
def models_versions(model: ModelArgument) -> None:
    """A model's versions."""
    with fleet(model=False) as client:
        found = list(client.registry.versions(model))
    if chosen.json:
        for version in found:
            show_json(version)
        return
    table = Table("version", "state", "metrics", "created")
    for version in found:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(version.metrics.items()) if not name.startswith("base_"))
        state = model_pb2.ModelVersion.State.Name(version.state).removeprefix("STATE_")
        table.add_row(names.last(version.name), state, metrics, moment(version.create_time))
    out.print(table)


@group.command("promote")
def models_promote(
    version: VersionArgument,
    held_out: Annotated[str, typer.Option("--held-out", help="a dataset version that no training has seen, as heldout/1")] = "",
    alias: AliasOption = "prod",
    percent: Annotated[int | None, typer.Option("--percent", help="share of callers; default: all")] = None,
    margin: Annotated[float | None, typer.Option("--margin", help="how much better it must be; default: 0")] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="measure on so many rows at most")] = None,
    force: Annotated[bool, typer.Option("--force", help="without evidence; needs models.force and is audited")] = False,
) -> None:
    """Measure a version against what is served and the base, and move the alias if it is better; exit code 8 if not."""
    with fleet(model=False) as client:
        try:
            done = client.registry.promote(version, held_out, alias=alias, percent=percent, margin=margin, max_rows=max_rows, force=force)
        except EvaluationNotPassed as lost:
            if chosen.json:
                show_json(lost.evaluation)
            else:
                tables.evaluation(lost.evaluation)
            raise
    if chosen.json:
        show_json(done.alias)
        return
    if done.evaluation is not None:
        tables.evaluation(done.evaluation)
    tables.alias(done.alias)


@group.command("rollback")
def models_rollback(model: ModelArgument, alias: AliasOption = "prod") -> None:
    """Point an alias back to what it pointed to before."""
    with fleet(model=False) as client:
        moved = client.registry.rollback(model, alias=alias)
    if chosen.json:
        show_json(moved)
    else:
        tables.alias(moved)


@group.command("import")
def models_import(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="as PEFT saves an adapter")],
    method: Annotated[str, typer.Option("--method", help="classify, chat or preference")],
    base: Annotated[str, typer.Option("--base", "-b", help="make the model on this base first")] = "",
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="of the head's rows, in order; repeat it")] = None,
) -> None:
    """A version from an adapter that was trained elsewhere."""
    with fleet(model=False) as client:
        if base:
            client.registry.create(model, base)
        version = client.registry.import_adapter(model, folder, method=method, labels=label or ())
    if chosen.json:
        show_json(version)
    else:
        tables.version(version)


@group.command("export")
def models_export(
    version: VersionArgument,
    file: Annotated[Path, typer.Option("--to", dir_okay=False, help="the tar archive to write")],
    merged: Annotated[bool, typer.Option("--merged", help="the base's weights with the adapter in them")] = False,
) -> None:
    """Write a version's weights, config, manifest and card to one archive."""
    with fleet(model=False) as client:
        written = client.registry.export(version, file, merged=merged)
    if chosen.json:
        show_json({"file": str(file), "bytes": written})
    else:
        out.print(f"{file}: {written:,} bytes", markup=False, soft_wrap=True)


@group.command("delete")
def models_delete(
    model: Annotated[str, typer.Argument(help="a model, as news, or a version, as news/3")],
    cascade: Annotated[bool, typer.Option("--cascade", help="with all that hangs on it")] = False,
) -> None:
    """Erase a model or a version."""
    with fleet(model=False) as client:
        told = client.registry.delete(model, cascade=cascade)
    if chosen.json:
        show_json(told)
    else:
        tables.deletion(told)
