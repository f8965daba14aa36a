"""Sixty short chats teach a base to speak as the clerk of a harbour. Leave `max_steps` out for the whole course."""

from pathlib import Path

import argosy

CHATS = Path(__file__).parent / "data" / "chat.jsonl"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    version = client.tune(CHATS, base=base, method="chat", model="clerk", rank=8, max_steps=8, seed=1).wait()
    config = argosy.config(temperature=0, max_output_tokens=24)
    for model in (base, version.name):
        said = client.chat("Do you ship bicycles?", model=model, config=config).outputs[0].text
        print(f"{model}: {said!r}")
