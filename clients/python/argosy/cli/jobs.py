"""`argosy jobs`: what is being tuned, and what became of it."""

from contextlib import nullcontext
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Column, Table

from argosy import errors, names
from argosy.cli import tables
from argosy.cli.live import Story, duration, moment, money, reason, state
from argosy.cli.session import app, chosen, err, fleet, out, show_json, show_messages
from argosy.client import Client
from argosy.v1 import finetune_pb2

Job = finetune_pb2.FineTuneJob
group = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="Tuning jobs of your project.")
app.add_typer(group, name="jobs")
JobArgument = Annotated[str, typer.Argument(help="a job: its UUID or whole name")]
_LINES = ("state", "evaluation", "warning", "checkpoint")  # events that a log without a terminal shows


def follow(client: Client, name: str, after: int = 0) -> None:
    """A job to its end, live on a terminal and line by line elsewhere; then its version. Raises JobFailed where it made none.

    A job that pauses for its cost limit ends the view: the sentence says how to go on. Ctrl-C ends the view and not the job.
    """
    story = Story(name=names.last(name))
    try:
        paused = _watched(client, name, after, story)
    except KeyboardInterrupt:
        err.print(f"The job goes on: argosy jobs watch {story.name}, or argosy jobs cancel {story.name}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    job = client.jobs.get(name)
    if paused:
        limit = f" of {money(job.max_cost)}" if job.HasField("max_cost") else ""
        err.print(f"Paused at its cost limit{limit}: argosy jobs resume {story.name} --max-cost MORE", markup=False, soft_wrap=True)
        raise typer.Exit(8)
    if job.state != Job.STATE_SUCCEEDED:
        raise errors.JobFailed.of(job)
    version = client.registry.version(job.model_version)
    if chosen.json:
        show_messages(model_version=version)
        return
    tables.version(version)
    tables.servable(story.servable)
    asks = "classify" if version.tuned_labels else "chat"
    out.print(f"ask it: argosy -m {tables.short(version.name)} {asks} TEXT", style="dim", markup=False, soft_wrap=True)
    if job.HasField("spent"):
        quoted = f"; quoted {money(job.quote.low_cost)} to {money(job.quote.high_cost)}" if job.quote.HasField("high_cost") else ""
        out.print(f"{money(job.spent)} for {duration(job.device_seconds)}{quoted}", markup=False)


def _watched(client: Client, name: str, after: int, story: Story) -> bool:
    """Whether the log ended at a cost limit."""
    with Live(story, console=out, refresh_per_second=4) if out.is_terminal and not chosen.json else nullcontext():
        for event in client.jobs.watch(name, after=after):
            story.take(event)
            if chosen.json:
                show_messages(event=event)
            elif not out.is_terminal and event.WhichOneof("event") in _LINES:
                _line(event, story)
            if (event.state.state, event.state.reason) == (Job.STATE_PAUSED, finetune_pb2.JOB_REASON_COST_LIMIT):
                return True
    return False


def _line(event: finetune_pb2.JobEvent, story: Story) -> None:
    match event.WhichOneof("event"):
        case "state":
            said = story.headline
        case "evaluation":
            said = f"step {event.evaluation.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(story.evaluation.items()))
        case "checkpoint":
            said = f"step {event.checkpoint.step}: checkpoint"
        case _:
            said = story.warnings[-1]
    out.print(said, markup=False, soft_wrap=True)


@group.callback()
def jobs(ctx: typer.Context) -> None:
    """Tuning jobs of your project."""
    if ctx.invoked_subcommand is None:
        jobs_list()


@group.command("list")
def jobs_list(filter: Annotated[str, typer.Option("--filter", help="as: state = RUNNING")] = "") -> None:
    """All of them, newest first."""
    with fleet(model=False) as client:
        found = list(client.jobs.list(filter=filter))
    if chosen.json:
        for job in found:
            show_json(job)
        return
    table = Table(Column("job", no_wrap=True), "state", "model", "steps", "spent", "created")
    for job in found:
        said = ", ".join(part for part in (state(job.state), reason(job.state_reason)) if part)
        steps = f"{job.step:,}/{job.target_step:,}" if job.target_step else ""
        spent = money(job.spent) if job.HasField("spent") else ""
        table.add_row(names.last(job.name), said, names.last(job.model), steps, spent, moment(job.create_time))
    out.print(table)


@group.command("show")
def jobs_show(job: JobArgument) -> None:
    """One job: state, quote and bill."""
    with fleet(model=False) as client:
        _show(client.jobs.get(job))


def _show(job: finetune_pb2.FineTuneJob) -> None:
    if chosen.json:
        show_json(job)
        return
    said = ", ".join(part for part in (state(job.state), reason(job.state_reason), job.error.message) if part)
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("job", job.name),
        ("state", said),
        ("model", job.model_version or job.model),
        ("base", job.spec.base_model),
        ("rows", job.spec.train_version),
        ("steps", f"{job.step:,} of {job.target_step:,}" if job.target_step else ""),
        ("attempt", str(job.attempt or "")),
        ("spent", f"{money(job.spent)} for {duration(job.device_seconds)}" if job.HasField("spent") else ""),
        ("limit", money(job.max_cost) if job.HasField("max_cost") else ""),
        ("where", ", ".join(f"{key} {value}" for key, value in sorted(job.error.metadata.items()))),
    ):
        if value:
            table.add_row(name, value)
    out.print(table)
    if job.HasField("quote"):
        tables.quote(job)


@group.command("watch")
def jobs_watch(job: JobArgument, after: Annotated[int, typer.Option("--after", help="leave out events up to this sequence")] = 0) -> None:
    """Follow a job to its end; the exit code is 8 unless it made a version."""
    with fleet(model=False) as client:
        follow(client, client.jobs.get(job).name, after)


@group.command("events")
def jobs_events(job: JobArgument, after: Annotated[int, typer.Option("--after", help="leave out events up to this sequence")] = 0) -> None:
    """What has happened so far, an event a line."""
    with fleet(model=False) as client:
        story = Story()
        for event in client.jobs.events(job, after=after):
            story.take(event)
            if chosen.json:
                show_json(event)
            else:
                out.print(f"{event.sequence:>6}  {event.time.ToJsonString()[11:19]}  ", end="", style="dim")
                _event(event, story)


def _event(event: finetune_pb2.JobEvent, story: Story) -> None:
    kind = event.WhichOneof("event")
    if kind in _LINES:
        _line(event, story)
        return
    said = {
        "progress": f"step {event.progress.step} of {event.progress.target_step}, {event.progress.tokens_per_second:,.0f} tokens/s",
        "metric": f"step {event.metric.step}: {event.metric.name} {event.metric.value:.4g}",
        "cost": f"{money(event.cost.spent)} for {duration(event.cost.device_seconds)}",
        "servable": f"servable on {event.servable.replicas}",
        "quoted": f"by its own {event.quoted.tokens_per_second:,.0f} tokens/s it takes "
        f"{duration(event.quoted.quote.device_seconds.low)} to {duration(event.quoted.quote.device_seconds.high)}",
    }.get(kind or "", "something newer than this command")
    out.print(said, markup=False, soft_wrap=True)


@group.command("cancel")
def jobs_cancel(job: JobArgument) -> None:
    """End a job for good; its checkpoints stay."""
    with fleet(model=False) as client:
        _show(client.jobs.cancel(job))


@group.command("pause")
def jobs_pause(job: JobArgument) -> None:
    """Commit a checkpoint and free the device."""
    with fleet(model=False) as client:
        _show(client.jobs.pause(job))


@group.command("resume")
def jobs_resume(
    job: JobArgument, max_cost: Annotated[str | None, typer.Option("--max-cost", help="a raised limit: 5.00, or 5.00 EUR")] = None
) -> None:
    """Go on from the last checkpoint."""
    with fleet(model=False) as client:
        _show(client.jobs.resume(job, max_cost=max_cost))


@group.command("checkpoints")
def jobs_checkpoints(job: JobArgument) -> None:
    """States that were committed, newest first."""
    with fleet(model=False) as client:
        found = list(client.jobs.checkpoints(job))
    if chosen.json:
        for checkpoint in found:
            show_json(checkpoint)
        return
    table = Table("step", "committed", "bytes", "metrics")
    for checkpoint in found:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in sorted(checkpoint.metrics.items()))
        table.add_row(f"{checkpoint.step:,}", moment(checkpoint.create_time), f"{checkpoint.total_bytes:,}", metrics)
    out.print(table)


@group.command("delete")
def jobs_delete(job: JobArgument) -> None:
    """Erase a job that has ended, with its checkpoints."""
    with fleet(model=False) as client:
        told = client.jobs.delete(job)
    if chosen.json:
        show_json(told)
    else:
        tables.deletion(told)
