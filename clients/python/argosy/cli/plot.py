"""`argosy plot`: a job's curves, in the terminal or as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from argosy import names
from argosy.cli.jobs import JobArgument
from argosy.cli.live import Story
from argosy.cli.session import app, chosen, fleet, out, show_json
from argosy.pictures import braille, draw


@app.command()
def plot(
    job: JobArgument,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="repeat it; default: every loss and accuracy")] = None,
    png: Annotated[Path | None, typer.Option("--png", dir_okay=False, help="write a picture instead")] = None,
) -> None:
    """Loss and metrics of a job, step by step."""
    story = Story(name=names.last(job))
    with fleet(model=False) as client:
        for event in client.jobs.events(job):
            story.take(event)
        chosen_metrics = metric or [name for name in story.series if "loss" in name or "accuracy" in name]
        missing = [name for name in chosen_metrics if name not in story.series]
        if missing or not chosen_metrics:
            known = ", ".join(sorted(story.series)) or "none yet"
            raise ValueError(f"the job has no metric {missing[0] if missing else 'to plot'}: it has {known}")
    series = {name: story.series[name] for name in chosen_metrics}
    if png is not None:
        png.write_bytes(draw(series, title=f"job {story.name[:8]}"))
        if chosen.json:
            show_json({"file": str(png), "metrics": sorted(series)})
        else:
            out.print(f"{png}", markup=False, soft_wrap=True)
    elif chosen.json:
        for name, points in series.items():
            show_json({"metric": name, "points": [{"step": step, "value": value} for step, value in points]})
    else:
        for name, points in series.items():
            out.print(name, style="bold", markup=False)
            for line in braille(points, width=max(24, min(out.width, 100) - 14)):
                out.print(line, markup=False, no_wrap=True)
