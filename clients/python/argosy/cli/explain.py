"""`argosy explain` and `argosy nearest`: what in a text speaks for its label, and which training rows are most like it."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from argosy.cli.session import app, chosen, err, fleet, out, show_json
from argosy.v1 import explanation_pb2


@app.command()
def explain(
    text: Annotated[str, typer.Argument(help="the text")],
    label: Annotated[str | None, typer.Option("--label", "-l", help="the label to explain; default: the likeliest")] = None,
    among: Annotated[list[str] | None, typer.Option("--among", help="a label of the set, zero-shot; repeat it")] = None,
    continuation: Annotated[str | None, typer.Option("--continuation", help="explain this text after the first instead")] = None,
    unit: Annotated[str, typer.Option("--unit", help="word, token or sentence")] = "word",
    cheap: Annotated[bool, typer.Option("--cheap", help="gradient times input instead of leaving out")] = False,
) -> None:
    """What in a text speaks for a label (green) and against it (red)."""
    with fleet() as client:
        told = client.explain(text, label, labels=among or (), continuation=continuation, cheap=cheap, unit=unit)
    if chosen.json:
        show_json(told)
        return
    out.print(_coloured(text, told), soft_wrap=True)
    strongest = sorted(told.attributions, key=lambda each: -abs(each.weight))[:8]
    width = max((abs(each.weight) for each in strongest), default=0.0) or 1.0
    for each in strongest:
        bar = ("+" if each.weight > 0 else "-") * max(1, round(24 * abs(each.weight) / width))
        out.print(f"{each.weight:+8.3f}  {bar:24}  {each.span.text}", markup=False, soft_wrap=True)
    faith = f" · faithfulness {told.faithfulness:.2f}" if told.HasField("faithfulness") else ""
    scores = f"log-probability {told.target_score:.3f}, with nothing {told.baseline_score:.3f}"
    err.print(f"{told.model.version} · {scores} · {told.usage.passes} passes{faith}", style="dim", soft_wrap=True)


@app.command()
def nearest(
    text: Annotated[str, typer.Argument(help="the text")],
    top: Annotated[int | None, typer.Option("--top", "-k", help="rows at most, 1 to 50; default: 10")] = None,
) -> None:
    """Which training rows of a tuned model are most like a text; the key needs `explain` and `datasets.content`."""
    with fleet() as client:
        found = client.nearest(text, top_k=top)
    if chosen.json:
        for each in found:
            show_json(each)
        return
    table = Table("similarity", "dataset version", "row")
    for each in found:
        table.add_row(f"{each.similarity:+.3f}", each.dataset_version, f"{each.row:,}")
    out.print(table, soft_wrap=True)


def _coloured(text: str, told: explanation_pb2.ExplainResponse) -> Text:
    """The text, each unit in the colour of its weight."""
    raw, painted, at = text.encode(), Text(), 0
    most = max((abs(each.weight) for each in told.attributions), default=0.0) or 1.0
    for each in sorted(told.attributions, key=lambda unit: unit.span.start_byte):
        painted.append(raw[at : each.span.start_byte].decode(errors="replace"))
        strength = abs(each.weight) / most
        style = ("bold " if strength > 0.5 else "") + ("green" if each.weight > 0 else "red") if strength > 0.1 else ""
        painted.append(raw[each.span.start_byte : each.span.end_byte].decode(errors="replace"), style=style)
        at = each.span.end_byte
    painted.append(raw[at:].decode(errors="replace"))
    return painted
