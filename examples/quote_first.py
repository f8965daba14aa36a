"""What a job would use, each number with an interval, and every value the fleet chose; nothing is trained."""

from pathlib import Path

import argosy

DATA = Path(__file__).parent / "data"

with argosy.Client() as client:
    base = next(model.name for model in client.models() if model.name.startswith("models/"))
    asked = client.tune(DATA / "sentences.tsv", base=base, method="classify", epochs=1, quote_only=True)
    quote = asked.quote
    print(f"{quote.tokens.low:,.0f} to {quote.tokens.high:,.0f} tokens, {quote.device_seconds.high:,.0f} s of {quote.device} at most")
    print(f"{quote.low_cost.nanos / 1e9:.6f} to {quote.high_cost.nanos / 1e9:.6f} {quote.high_cost.currency_code}")
    print("learning rate", asked.job.resolved_spec.hyperparameters.learning_rate, "rank", asked.job.resolved_spec.lora.rank)
