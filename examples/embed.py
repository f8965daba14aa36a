"""Three sentences as vectors, compared by their cosine."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose again."]
    first, second, third = (list(each.values) for each in client.embed(texts, model=model).embeddings)
    print("alike:    ", round(sum(a * b for a, b in zip(first, second, strict=True)), 3))
    print("different:", round(sum(a * b for a, b in zip(first, third, strict=True)), 3))
