"""Why a label: what each word of a sentence adds to it, in nats, and whether the order can be believed."""

import argosy

TEXT = "The staff were kind, but the room was filthy."

with argosy.Client() as client:
    model = next(iter(client.models())).name
    reply = client.explain(TEXT, labels=["complaint", "praise"], model=model)
    for one in sorted(reply.attributions, key=lambda one: -one.weight):
        print(f"{one.weight:+.3f}  {one.span.text.strip()}")
    print(f"log-probability {reply.target_score:.3f}; with no word {reply.baseline_score:.3f}")
    print(f"faithfulness {reply.faithfulness:.2f} of 1, from {reply.usage.passes} passes")
