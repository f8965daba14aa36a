"""A streamed chat turn, with every event: started, text, finished, completed."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    with client.stream_chat("Say hello in French.", model=model, config=argosy.config(temperature=0, max_output_tokens=16)) as stream:
        for event in stream.events():
            print(event.sequence, event.WhichOneof("event"), repr(event.text.text) if event.HasField("text") else "")
    print("total:", stream.result.completed.usage.output_tokens, "tokens out")
