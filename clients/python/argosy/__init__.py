"""Argosy for Python: ask a model on your own fleet, and see what it cost.

    import argosy

    with argosy.Client() as client:  # ARGOSY_ADDRESS and ARGOSY_API_KEY say where and who
        print(client.generate("Once upon a time").outputs[0].text)

`Client` blocks, `AsyncClient` is for asyncio; both have the same methods and answer the messages of `argosy.v1`. Errors are the types of
`argosy.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argosy.aio import AsyncClient, AsyncGenerationStream
    from argosy.channel import Target
    from argosy.client import Client, GenerationStream
    from argosy.errors import ArgosyError
    from argosy.requests import config
    from argosy.specs import spec

__all__ = ["ArgosyError", "AsyncClient", "AsyncGenerationStream", "Client", "GenerationStream", "Target", "config", "spec"]

_HOMES = {
    "ArgosyError": "errors",
    "AsyncClient": "aio",
    "AsyncGenerationStream": "aio",
    "Client": "client",
    "GenerationStream": "client",
    "Target": "channel",
    "config": "requests",
    "spec": "specs",
}


def __getattr__(name: str) -> Any:
    """Import on first use: a server that needs only the stubs in `argosy.v1` loads no client."""
    if name not in _HOMES:
        raise AttributeError(f"module 'argosy' has no attribute {name!r}")
    return getattr(import_module(f"argosy.{_HOMES[name]}"), name)
