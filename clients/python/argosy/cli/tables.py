"""Reports, quotes and versions as tables."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from argosy import names
from argosy.cli.live import duration, money
from argosy.cli.session import out
from argosy.v1 import dataset_pb2, deletion_pb2, finetune_pb2, model_pb2

_MOST = 20  # rows of a table of findings; the rest is counted


def report(version: dataset_pb2.DatasetVersion) -> None:
    """What validation found, in numbers and by rule."""
    found = version.report
    state = dataset_pb2.DatasetVersion.State.Name(version.state).removeprefix("STATE_")
    skipped = f", {version.skipped_rows:,} skipped" if version.skipped_rows else ""
    out.print(
        f"{version.name}: {state}, {found.rows:,} rows, {found.errors:,} errors, {found.warnings:,} warnings{skipped}",
        markup=False,
        soft_wrap=True,
    )
    if found.labels:
        most = max(each.rows for each in found.labels)
        table = Table("label", "rows", "")
        for each in found.labels[:_MOST]:
            table.add_row(each.label, f"{each.rows:,}", "█" * max(1, round(30 * each.rows / most)))
        if len(found.labels) > _MOST:
            table.add_row(f"and {len(found.labels) - _MOST:,} more", "", "")
        out.print(table)
    if found.rules:
        table = Table("rule", "severity", "count", "first line")
        for rule in found.rules:
            table.add_row(rule.rule, _severity(rule.severity), f"{rule.count:,}", f"{rule.first_line:,}" if rule.first_line else "all")
        out.print(table)
    if found.pii:
        out.print("personal data: " + ", ".join(f"{each.count:,} {each.kind} in {each.rows:,} rows" for each in found.pii), markup=False)


def findings(found: Sequence[dataset_pb2.RowError], most: int = _MOST) -> None:
    """Findings by line, byte offset, field and rule."""
    if not found:
        return
    table = Table("line", "byte offset", "field", "rule", "severity")
    for each in found[:most]:
        table.add_row(f"{each.line:,}" if each.line else "all", f"{each.byte_offset:,}", each.field, each.rule, _severity(each.severity))
    if len(found) > most:
        table.add_row(f"and {len(found) - most:,} more", "", "", "", "")
    out.print(table)


def _severity(value: dataset_pb2.RowSeverity.ValueType) -> str:
    return dataset_pb2.RowSeverity.Name(value).removeprefix("ROW_SEVERITY_").lower()


def quote(job: finetune_pb2.FineTuneJob) -> None:
    """What a job will use, each with its interval, and the values that were chosen."""
    said = job.quote
    title = f"{names.last(job.spec.base_model)} on {said.device or 'a device'}"
    table = Table("quote", "at least", "at most", title=title, title_justify="left")
    for what, each, shown in (
        ("tokens", said.tokens, "{:,.0f}".format),
        ("steps", said.steps, "{:,.0f}".format),
        ("time", said.device_seconds, duration),
        ("memory", said.peak_bytes, lambda value: f"{value / 2**30:.2f} GiB"),
    ):
        table.add_row(what, shown(each.low), shown(each.high))
    if said.HasField("high_cost"):
        table.add_row("money", money(said.low_cost), money(said.high_cost))
    out.print(table)
    chosen = job.resolved_spec
    if chosen.HasField("hyperparameters"):
        learns, lora = chosen.hyperparameters, chosen.lora
        parts = [f"rank {lora.rank}"] if chosen.HasField("lora") else ["every weight"]
        parts += [
            f"learning rate {learns.learning_rate:g}",
            f"{learns.epochs:g} epochs",
            f"batch {learns.batch_size}",
            f"seed {chosen.seed}",
        ]
        out.print("chosen: " + ", ".join(parts), style="dim", markup=False)


def version(made: model_pb2.ModelVersion) -> None:
    """A version: its metrics, next to the base's where they were measured, and how well its probabilities hold."""
    out.print(made.name, style="bold", markup=False, soft_wrap=True)
    own = {name: value for name, value in made.metrics.items() if not name.startswith("base_")}
    if own:
        table = Table("metric", "this version", "the base")
        for name, value in sorted(own.items()):
            table.add_row(name, f"{value:.4g}", f"{made.metrics[f'base_{name}']:.4g}" if f"base_{name}" in made.metrics else "")
        out.print(table)
    if made.HasField("calibration"):
        fit = made.calibration
        out.print(
            f"calibration error {fit.error_before:.3f} before, {fit.error_after:.3f} after (temperature {fit.temperature:.3f})",
            markup=False,
        )
    if made.tuned_labels:
        out.print("labels: " + ", ".join(made.tuned_labels), markup=False)
    if made.HasField("privacy"):
        kept = made.privacy
        out.print(f"private: epsilon {kept.epsilon:g}, delta {kept.delta:g} by {kept.accountant}; protects its training rows", markup=False)


def servable(told: finetune_pb2.JobServable | None) -> None:
    """How soon it could be asked."""
    if told is None:
        return
    elapsed_ms = told.elapsed.ToMicroseconds() / 1_000
    many = "1 replica" if told.replicas == 1 else f"{told.replicas} replicas"
    out.print(f"servable on {many} {elapsed_ms:,.0f} ms after it was made", style="green", markup=False)


def evaluation(told: model_pb2.Evaluation) -> None:
    """The evidence: each model's score, and the candidate against each."""
    state = model_pb2.Evaluation.State.Name(told.state).removeprefix("STATE_")
    table = Table("model", "metric", "value", "gain", "at least", "p", "test", "", title=f"{state} on {told.measured_rows:,} rows")
    against = {each.against: each for each in told.comparisons}
    for score in told.scores:
        row = [short(score.model), score.metric, f"{score.value:.4f}"]
        seen = against.get(score.model)
        if seen is not None:
            row += [f"{seen.gain:+.4f}", f"{seen.gain_low:+.4f}", f"{seen.p_value:.3g}", seen.test, "✓" if seen.passed else "✗"]
        table.add_row(*row)
    out.print(table)


def short(name: str) -> str:
    """`news/3` of a version, `gemma-3-270m` of a base."""
    return "/".join(name.split("/")[3::2]) or names.last(name)


def alias(told: model_pb2.ModelAlias) -> None:
    """Where an alias points."""
    targets = ", ".join(f"{short(each.version)}" + (f" {each.percent} %" if each.percent not in (0, 100) else "") for each in told.targets)
    out.print(f"{told.name} → {targets}", markup=False, soft_wrap=True)


def deletion(told: deletion_pb2.Deletion) -> None:
    """What is erased."""
    state = deletion_pb2.Deletion.State.Name(told.state).removeprefix("STATE_").lower()
    out.print(f"{told.target}: erasure {state} ({told.name})", markup=False, soft_wrap=True)
    rest: Iterable[str] = (each for each in told.erased if each != told.target)
    for name in rest:
        out.print(f"  with it {name}", markup=False, soft_wrap=True)
