"""The same seed gives the same text; the seed that was drawn is always told."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    first = client.generate("My favourite animal is", model=model, config=argosy.config(temperature=1, max_output_tokens=16))
    seed = first.completed.effective_config.sampling.seed
    config = argosy.config(temperature=1, max_output_tokens=16, seed=seed)
    again = client.generate("My favourite animal is", model=model, config=config)
    print("seed", seed, "gave the same text again:", first.outputs[0].text == again.outputs[0].text)
