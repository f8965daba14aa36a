"""From a service's descriptor and an object with its methods to handlers. GenerationEvents leave as the bytes they arrived as."""

from __future__ import annotations  # the generic handlers exist in grpc's stubs only

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

EVENT = "argosy.v1.GenerationEvent"


def handlers(service: ServiceDescriptor, servicer: object) -> grpc.GenericRpcHandler[Any, Any]:
    """One handler a method that `servicer` has; a method it lacks is UNIMPLEMENTED. None here streams requests."""
    found = ((method, getattr(servicer, method.name, None)) for method in service.methods)
    table = {method.name: handler_of(method, handler) for method, handler in found if handler is not None}
    return grpc.method_handlers_generic_handler(service.full_name, table)


def handler_of(method: MethodDescriptor, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler of one method that takes and returns messages."""
    parse = message_factory.GetMessageClass(method.input_type).FromString
    if method.server_streaming:
        write: Callable[[Any], bytes] = _as_it_is if method.output_type.full_name == EVENT else _serialize
        return grpc.unary_stream_rpc_method_handler(handler, parse, write)
    return grpc.unary_unary_rpc_method_handler(handler, parse, _serialize)


def _as_it_is(event: bytes) -> bytes:
    return event


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())
