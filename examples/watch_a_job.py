"""A job's log as it grows: it can be left and taken up again at any event, by any process."""

from pathlib import Path

import argosy

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    tuning = client.tune(DATA / "sentences.tsv", base=base, method="classify", max_steps=10)
    seen = 0
    for event in tuning.events():
        seen = event.sequence
        if event.HasField("state"):
            break
    for event in client.jobs.watch(tuning.name, after=seen):
        match event.WhichOneof("event"):
            case "metric" if event.metric.name == "loss":
                print(f"step {event.metric.step}: loss {event.metric.value:.3f}")
            case "state":
                print(type(tuning.job).State.Name(event.state.state))
            case "servable":
                print(f"servable on {event.servable.replicas} after {event.servable.elapsed.ToMilliseconds()} ms")
