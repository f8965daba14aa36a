"""Continue a raw prompt: one call, one whole answer, and what it cost."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    result = client.generate("The capital of France is", model=model, config=argosy.config(temperature=0, max_output_tokens=12))
    print(result.outputs[0].text.strip())
    usage = result.completed.usage
    print(f"{result.started.model.version}: {usage.input_tokens} tokens in, {usage.output_tokens} out")
