"""A real call from outside: a key that ends by itself, the models there are, and one token of one of them. `helm test` runs it."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from argosy.v1 import config_pb2, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from services.chassis.channel import open_channel
from services.gateway.store import Store, lend

SCOPES = frozenset({"generate", "models.read"})
KEY_SECONDS = 600  # the key of a trial that dies outlives it by no more
CALL_SECONDS = 60.0  # a replica that has just loaded computes its first token slowly
PAGE = 100


class TrialFailed(Exception):
    """The fleet does not answer; one sentence says what it said instead."""


@dataclass(frozen=True)
class Answered:
    """What a trial saw."""

    model: str
    text: str
    output_tokens: int


async def trial(store: Store, address: str, ca: Path | None, model: str = "", environment: str = "live") -> Answered:
    """Ask the gateway at `address` for one token.

    Args:
        store: the gateway's, with its schema ready; a key is lent from it.
        address: host:port, as callers reach it.
        ca: PEM of who signed the gateway's certificate; None: plaintext, on this machine only.
        model: `models/{name}`; empty: the first that is listed.
        environment: goes into the key's text.

    Raises:
        TrialFailed: no model is listed, or a call failed.
    """
    metadata = (("authorization", f"Bearer {await lend(store, KEY_SECONDS, SCOPES, environment)}"),)
    credentials = None if ca is None else grpc.ssl_channel_credentials(ca.read_bytes())
    async with open_channel(address, credentials=credentials) as channel:
        try:
            listed = await model_pb2_grpc.ModelServiceStub(channel).ListModels(
                model_pb2.ListModelsRequest(page_size=PAGE), metadata=metadata, timeout=CALL_SECONDS, wait_for_ready=True
            )
            names = [each.name for each in listed.models]
            if not names:
                raise TrialFailed(f"{address} serves no model yet")
            result = await generation_pb2_grpc.GenerationServiceStub(channel).GenerateText(
                generation_pb2.GenerateTextRequest(
                    model=model or names[0],
                    prompt="Ships sleep in",
                    config=config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=1)),
                ),
                metadata=metadata,
                timeout=CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise TrialFailed(f"{address} answered {error.code().name}: {error.details()}") from error
    return Answered(model or names[0], result.outputs[0].text, result.completed.usage.output_tokens)
