"""Several labels may be true at once: each is judged alone."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    text = "The striker bought a technology company after the final."
    reply = client.classify(text, ["sports", "business", "cooking"], multi_label=True, model=model)
    print({score.label: round(score.probability, 3) for score in reply.results[0].labels})
