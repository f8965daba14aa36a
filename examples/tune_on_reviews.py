"""A file whose columns have other names, and a limit on what the job may cost."""

from pathlib import Path

import argosy

REVIEWS = Path(__file__).parent / "data" / "reviews.tsv"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    version = client.tune(
        REVIEWS,
        base=base,
        method="classify",
        text_columns=["review"],
        label_column="sentiment",
        max_steps=12,
        max_cost="5 USD",
    ).wait()
    fit = version.calibration
    print(f"calibration error {fit.error_before:.3f} before, {fit.error_after:.3f} after")
    for review in ("It broke on the first day.", "Best purchase of the year!"):
        best = client.classify(review, model=version.name).results[0].labels[0]
        print(f"{best.label:9} {best.probability:.2f}  {review}")
