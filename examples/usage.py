"""What did my project use? The same figures that are billed."""

import argosy

with argosy.Client() as client:
    me = client.caller()
    print("project", me.project, "scopes", ", ".join(sorted(me.scopes)))
    for each in client.usage(me.project):
        print(each.requests, "requests,", each.usage.input_tokens, "tokens in,", each.usage.output_tokens, "out")
