"""Every RPC has a row, and nothing else is served."""

import importlib
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import MethodDescriptor

from services.gateway.access import ACCESS, SCOPES, Cost, Idempotency, access_of

MODULES = [f"argosy.v1.{m}_pb2" for m in ("generation", "language", "embedding", "explanation", "model")] + [
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
    assert access.stream == method.server_streaming
    has_request_id = "request_id" in method.input_type.fields_by_name
    repeatable = access.idempotency is not Idempotency.READ
    assert has_request_id == repeatable or method.name == "GetRequestUsage" or (has_request_id and access.cost is Cost.REQUEST)
    if access.cost is not Cost.REQUEST:
        assert access.idempotency is Idempotency.HANDLE
    assert access.cap_s == (300.0 if access.stream or access.cost is not Cost.REQUEST else 30.0)


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
