"""Why a continuation: which words of a prompt the next one hangs on."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    reply = client.explain("The capital of France is the city of", continuation=" Paris", model=model)
    for one in reply.attributions:
        print(f"{one.weight:+.3f}  {one.span.text}")
    print(f'log-probability of " Paris": {reply.target_score:.3f} after the prompt, {reply.baseline_score:.3f} after nothing')
