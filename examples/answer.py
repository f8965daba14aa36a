"""A question answered by a span of a passage: the answer is always really there."""

import argosy

PASSAGE = "The Eiffel Tower was completed in 1889 and is 330 metres tall. It stands in Paris."

with argosy.Client() as client:
    model = next(iter(client.models())).name
    reply = client.answer("When was the Eiffel Tower completed?", {"tower": PASSAGE}, top_k=3, model=model)
    for answer in reply.answers:
        span = answer.span
        assert PASSAGE.encode()[span.start_byte : span.end_byte].decode() == span.text
        print(f"{answer.probability:.2f} {span.text!r} at bytes {span.start_byte}-{span.end_byte} of {span.source_id}")
    print(f"{reply.no_answer_probability:.2f} no answer")
