"""A request as its price: read once, after its bounds were checked, and never again."""

import dataclasses
import hashlib
import uuid
from typing import Any

from argosy.v1 import config_pb2, content_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis import bounds, status
from services.chassis.errors import FieldOutOfRange, MetadataInvalid
from services.gateway.admission import Rank
from services.gateway.catalog import require
from services.gateway.routing import PREFIX_BYTES
from services.gateway.servicers.relay import Plan, Relay, caller

BYTES_PER_TOKEN = 3  # fewer than real text has, so that the estimate errs upwards; Started corrects it
STICKY_KEY, STICKY_BYTES = "argosy-sticky-key", 128
TEMPLATE_TOKENS = 16  # a message's share of a chat template


def sticky_key(context: Any) -> str:
    """What the caller wants to be told apart by where an alias is split, such as its own user's id; "": each request by itself.

    Raises:
        MetadataInvalid: twice, or longer than 128 bytes.
    """
    values = [value for key, value in context.invocation_metadata() if key == STICKY_KEY]
    if len(values) > 1 or any(len(value) > STICKY_BYTES for value in values):
        raise MetadataInvalid(STICKY_KEY)
    return str(values[0]) if values else ""


def tokens_of(size: int) -> int:
    """Tokens that `size` bytes of prompt are taken for."""
    return -(-size // BYTES_PER_TOKEN)


async def plan(
    relay: Relay,
    request: Any,
    context: Any,
    *,
    method: str,
    capability: str,
    size: int | None = None,
    outputs: int = 0,
    asked: int | None = None,
    prefix: str = "",
    stream: bool = False,
) -> Plan:
    """Check `request` and price it. Any inference request: it has model, request_id, work_class.

    `size` is its bytes of prompt (unset: all of it); `outputs` answers of at most `asked` tokens each (unset: the ceiling) are reserved.
    Raises what bounds.check, Relay.resolve and catalog.require raise, FieldOutOfRange over the ceiling, NotStarted without replicas.
    """
    bounds.check(request)
    who = caller()
    request_id = request.request_id or who.request_id or str(uuid.uuid4())
    who = dataclasses.replace(who, request_id=request_id)
    kept = [pair for pair in context.trailing_metadata() or () if pair[0] != status.REQUEST_ID_KEY]
    context.set_trailing_metadata((*kept, (status.REQUEST_ID_KEY, request_id)))
    served = await relay.resolve(request.model, who, sticky_key(context) or request_id)
    require(served, capability)
    ceiling = ceiling_of(relay, who.output_token_ceiling)
    if asked is not None and asked > ceiling:
        raise FieldOutOfRange("config.stopping.max_output_tokens", asked, ceiling, "tokens")
    config = request.config if "config" in request.DESCRIPTOR.fields_by_name else None
    return Plan(
        method=method,
        model=request.model,
        served=served,
        caller=who,
        request_id=request_id,
        rank=Rank.BATCH if request.work_class == config_pb2.WORK_CLASS_BATCH else Rank.INTERACTIVE,
        input_tokens=min(served.context_tokens, tokens_of(request.ByteSize() if size is None else size) + TEMPLATE_TOKENS),
        output_tokens=outputs * min(served.context_tokens, asked or ceiling),
        body_digest=hashlib.sha256(request.SerializeToString(deterministic=True)).digest() if request.request_id else b"",
        prefix=prefix[:PREFIX_BYTES].encode(errors="replace"),
        time_limit_s=time_limit_s(config),
        stream=stream,
    )


def ceiling_of(relay: Relay, own: int | None) -> int:
    """Tokens of one output: the caller's ceiling, else the gateway's."""
    return relay.placing.output_token_ceiling if own is None else own


def time_limit_s(config: config_pb2.GenerationConfig | None) -> float | None:
    """The soft limit asked for, in seconds."""
    if config is None or not config.stopping.HasField("time_limit"):
        return None
    return config.stopping.time_limit.ToNanoseconds() / 1e9


def outputs_of(config: config_pb2.GenerationConfig) -> int:
    """How many answers are asked for."""
    return config.sampling.n if config.sampling.HasField("n") else 1


def asked_of(config: config_pb2.GenerationConfig) -> int | None:
    """max_output_tokens, None if unset."""
    return config.stopping.max_output_tokens if config.stopping.HasField("max_output_tokens") else None


def generation(relay: Relay, made: Plan, request: Any, config: config_pb2.GenerationConfig, **prompt: Any) -> engine_pb2.GenerateRequest:
    """The replica's request around the caller's, which travels unopened. `generation_id` is set by the attempt."""
    return engine_pb2.GenerateRequest(
        request_id=made.caller.request_id,
        model=served_model(made),
        config=config,
        output_token_ceiling=ceiling_of(relay, made.caller.output_token_ceiling),
        work_class=request.work_class,
        **prompt,
    )


def encoding(made: Plan, request: Any, **task: Any) -> engine_pb2.EncodeRequest:
    """The same for what writes no text."""
    return engine_pb2.EncodeRequest(request_id=made.caller.request_id, model=served_model(made), work_class=request.work_class, **task)


def attribution(made: Plan, request: Any) -> engine_pb2.AttributeRequest:
    """The same for an explanation."""
    return engine_pb2.AttributeRequest(
        request_id=made.caller.request_id, model=served_model(made), explain=request, work_class=request.work_class
    )


def served_model(made: Plan) -> content_pb2.ServedModel:
    """What the name was resolved to, fixed at admission."""
    return content_pb2.ServedModel(version=made.served.name, base_digest=made.served.digest, adapter_digest=made.served.adapter)
