"""A job that is paused keeps its checkpoint and frees the device; it goes on later, and can be ended for good."""

from pathlib import Path

import argosy

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    tuning = client.tune(DATA / "sentences.tsv", base=base, method="classify", epochs=50, checkpoint_interval_steps=5)
    states = type(tuning.job).State
    tuning.pause()
    for event in tuning.events():
        if event.HasField("state"):
            print(states.Name(event.state.state))
            if event.state.state == states.STATE_PAUSED:
                break
    tuning.resume()
    tuning.cancel()
    last = [event.state.state for event in tuning.events() if event.HasField("state")][-1]
    print(states.Name(last))
