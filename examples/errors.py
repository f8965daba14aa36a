"""Errors are types, with the field and the bound: nothing has to be parsed."""

import argosy
from argosy.errors import InvalidArgument, NotFound

with argosy.Client() as client:
    model = next(iter(client.models())).name
    try:
        client.generate("Hello", model=model, config=argosy.config(temperature=9))
    except InvalidArgument as error:
        print(error.reason, error.field, error.metadata["limit"])
    try:
        client.generate("Hello", model="models/no-such-model")
    except NotFound as error:
        print(error.reason, error.field)
