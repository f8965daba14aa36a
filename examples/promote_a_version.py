"""An alias moves only to a version that is better than the base and than what it points to, on rows that no training has seen."""

from pathlib import Path

import argosy
from argosy import errors, tuning

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    version = client.tune(DATA / "sentences.tsv", base=base, method="classify", model="desk", max_steps=20, seed=1).wait()
    held_out = tuning.prepared(client, DATA / "heldout.tsv", "classify")
    try:
        done = client.registry.promote(version.name, held_out.name, max_rows=60)
    except errors.EvaluationNotPassed as refused:
        print("not better:", [(each.against, round(each.gain, 3)) for each in refused.evaluation.comparisons])
    else:
        print(done.alias.name, "points to", done.alias.targets[0].version)
        print(client.classify("Rates stay where they are", model="/".join(version.name.split("/")[:4])).model.version)
