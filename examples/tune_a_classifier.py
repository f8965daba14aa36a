"""Labelled sentences in, a served classifier out. Leave `max_steps` out to go over all rows three times."""

from pathlib import Path

import argosy

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    tuning = client.tune(DATA / "sentences.tsv", base=base, method="classify", held_out=DATA / "heldout.tsv", max_steps=20, seed=1)
    version = tuning.wait()
    print(version.name, {name: round(value, 3) for name, value in version.metrics.items()})

    # No labels in the call: they are the model's own now, and their probabilities are calibrated.
    reply = client.classify("A chip that runs on light doubles its clock", model=version.name)
    for score in reply.results[0].labels:
        print(f"{score.label:12} {score.probability:.3f}")
