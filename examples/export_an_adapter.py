"""A tuned version is yours: its adapter in PEFT's own form, with its signed manifest, in one archive."""

import tarfile
from pathlib import Path

import argosy

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    version = client.tune(DATA / "reviews.tsv", base=base, method="classify", max_steps=4,
                          text_columns=["review"], label_column="sentiment").wait()  # fmt: skip
    target = Path("reviews-adapter.tar")
    print(client.registry.export(version.name, target), "bytes")
    with tarfile.open(target) as archive:
        for entry in archive:
            print(f"{entry.size:>10,} {entry.name}")
    target.unlink()
