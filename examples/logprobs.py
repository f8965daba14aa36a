"""How sure was the model? The log-probability of each token, and the runners-up."""

import math

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    config = argosy.config(temperature=0, max_output_tokens=4, top_logprobs=3)
    result = client.generate("The opposite of hot is", model=model, config=config)
    for token in result.outputs[0].tokens:
        others = ", ".join(f"{other.token.decode(errors='replace')!r} {math.exp(other.logprob):.2f}" for other in token.top)
        print(f"{token.token.decode(errors='replace')!r} {math.exp(token.logprob):.2f}   of {others}")
