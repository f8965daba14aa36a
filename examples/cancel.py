"""Stop reading and the engine stops writing: you pay for what was written, not for what was asked."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    words = 0
    with client.stream_generate("Count slowly: one, two,", model=model, config=argosy.config(max_output_tokens=2000)) as stream:
        for _ in stream:
            words += 1
            if words == 5:
                break
    print("stopped after", words, "pieces")
