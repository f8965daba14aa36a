"""Two sentences from English to French in one call: output i belongs to text i."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    texts = ["Good morning.", "The ship is in the harbour."]
    config = argosy.config(temperature=0, max_output_tokens=32)
    result = client.translate(texts, "fr", source_language="en", model=model, config=config)
    for text, output in zip(texts, result.outputs, strict=True):
        print(f"{text} -> {output.text.strip()}")
