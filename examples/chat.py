"""A dialogue of two turns: the history is yours to keep."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    messages = [("user", "Name one colour of the rainbow.")]
    for follow_up in ("And another one?", None):
        reply = client.chat(messages, model=model, config=argosy.config(temperature=0, max_output_tokens=24))
        print("user:", messages[-1][1], "\nassistant:", reply.outputs[0].text.strip())
        if follow_up:
            messages += [("assistant", reply.outputs[0].text), ("user", follow_up)]
