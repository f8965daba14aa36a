"""Four different endings of one prompt, which is read only once."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    config = argosy.config(n=4, temperature=1, seed=3, max_output_tokens=10, stop=["\n"])
    result = client.generate("The best thing about the sea is", model=model, config=config)
    for output in result.outputs:
        print("-", output.text.strip())
