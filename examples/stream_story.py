"""A story, word by word. Leaving the block early would stop the engine."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    config = argosy.config(temperature=0.8, top_p=0.95, seed=7, max_output_tokens=60)
    with client.stream_generate("Once upon a time, in a harbour town,", model=model, config=config) as stream:
        for text in stream:
            print(text, end="", flush=True)
    print(f"\n[{stream.result.outputs[0].finished.reason}]")
