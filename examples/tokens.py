"""How a text becomes tokens, and how much room is left for an answer."""

import argosy

with argosy.Client() as client:
    model = next(iter(client.models())).name
    count = client.count_tokens("Ships sail at dawn.", model=model)
    print(count.tokens, "tokens, room for", count.room)
    print([token.token.decode(errors="replace") for token in client.tokenize("Ships sail at dawn.", model=model).tokens])
