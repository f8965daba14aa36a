"""Every RPC has a row, and nothing else is served."""

import importlib
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import MethodDescriptor

from services.gateway.access import ACCESS, SCOPES, Cost, Idempotency, access_of

MODULES = [f"argosy.v1.{m}_pb2" for m in ("generation", "language", "embedding", "explanation", "model", "dataset", "finetune")] + [
    f"argosy.admin.v1.{m}_pb2" for m in ("project", "api_key", "quota", "usage")
]


def methods() -> Iterator[tuple[str, MethodDescriptor]]:
    for module in MODULES:
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name}", method


def test_C2_every_rpc_has_scope_cost_idempotency() -> None:
    assert {path for path, _ in methods()} == set(ACCESS)


@pytest.mark.parametrize(("path", "method"), list(methods()), ids=lambda value: value if isinstance(value, str) else "")
def test_row_fits_its_rpc(path: str, method: MethodDescriptor) -> None:
    access = ACCESS[path]
    assert access.scope is None or access.scope in SCOPES
    assert (access.stream, access.client_stream) == (method.server_streaming, method.client_streaming)
    asked = method.input_type.fields_by_name
    has_request_id = "request_id" in (asked["header"].message_type.fields_by_name if method.client_streaming else asked)
    repeatable = access.idempotency not in {Idempotency.READ, Idempotency.OFFSET}
    assert has_request_id == repeatable or method.name == "GetRequestUsage" or (has_request_id and access.cost is Cost.REQUEST)
    generates = access.cost in {Cost.TOKENS, Cost.PASSES}
    if generates:
        assert access.idempotency is Idempotency.HANDLE
    assert access.long == (method.name == "FinalizeUpload")
    long = generates or method.server_streaming or method.client_streaming or access.long
    assert access.cap_s() == (300.0 if long else 30.0)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/argosy.v1.GenerationService/chat", "/argosy.v1.GenerationService/Chat/", "//argosy.v1.GenerationService/Chat",
        "/argosy.v1.GenerationService/../GenerationService/Chat", "argosy.v1.GenerationService/Chat",
        "/argosy.v1.GenerationService/Chat?x=1", "/argosy.internal.engine.v1.EngineService/Generate",
        "/grpc.channelz.v1.Channelz/GetServers",
    ],
)  # fmt: skip
def test_A12_only_the_exact_path_counts(path: str) -> None:
    assert access_of(path) is None
