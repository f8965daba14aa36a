"""Is a review positive, neutral or negative?"""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    reviews = ["An excellent film, I loved every minute.", "Broken on arrival, and nobody answers."]
    reply = client.sentiment(reviews, model=model)
    for review, result in zip(reviews, reply.results, strict=True):
        print(f"{result.labels[0].label:9} {result.labels[0].probability:.2f}  {review}")
