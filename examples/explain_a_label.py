"""Which words speak for a label, and which against it, by what leaving each out does to the label's log-probability."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    headline = "Goalkeeper signs a record contract with the bank"
    told = client.explain(headline, "sports", labels=["sports", "finance"], model=model)
    print(f"log-probability {told.target_score:.2f}, without a word {told.baseline_score:.2f}, {told.usage.passes} passes")
    for each in sorted(told.attributions, key=lambda unit: -unit.weight):
        print(f"{each.weight:+.3f} {each.span.text}")
