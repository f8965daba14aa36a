"""A summary that is at least 10 and at most 40 tokens long."""

import argosy

ARTICLE = """The city council voted on Tuesday to turn the old ferry terminal into a public library. Work starts in spring and should
take two years. The building has stood empty since 2009, when the last ferry to the islands was replaced by a bridge."""

with argosy.Client() as client:
    model = next(iter(client.models())).name
    result = client.summarize(ARTICLE, min_length=10, max_length=40, model=model, config=argosy.config(temperature=0))
    print(result.outputs[0].text.strip())
    assert result.completed.usage.output_tokens >= 10
