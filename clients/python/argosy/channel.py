"""How the library reaches a fleet: address, credential, keepalive, and which calls gRPC may repeat."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc import aio

try:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:  # no dependency of ours: a program that traces itself has it
    _PROPAGATOR = None
else:
    _PROPAGATOR = TraceContextTextMapPropagator()

# Only calls that the fleet makes safe: reads, and what carries a request_id. gRPC repeats them before the fleet's first answer only.
_RETRIED = (
    {"service": "argosy.v1.GenerationService"},
    {"service": "argosy.v1.LanguageService"},
    {"service": "argosy.v1.EmbeddingService"},
    {"service": "argosy.v1.ExplanationService"},
    {"service": "argosy.v1.ModelService"},
    {"service": "argosy.v1.DatasetService"},
    {"service": "argosy.v1.FineTuneService"},
    {"service": "argosy.admin.v1.ProjectService"},
    {"service": "argosy.admin.v1.ApiKeyService"},
    {"service": "argosy.admin.v1.QuotaService"},
    {"service": "argosy.admin.v1.UsageService"},
)
# What sends a file: the library goes on at an offset instead of sending all of it again.
_SENT = (
    {"service": "argosy.v1.DatasetService", "method": "WriteUpload"},
    {"service": "argosy.v1.ModelService", "method": "ImportModelVersion"},
)
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": list(_RETRIED),
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
        {"name": list(_SENT)},
    ],
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}
_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 32 << 20),
)


@dataclass(frozen=True)
class Target:
    """Where a fleet is and who is calling. Unset values come from ARGOSY_ADDRESS, ARGOSY_API_KEY and ARGOSY_CA, then from the defaults.

    TLS is used unless the address is on this machine; `ca` is a PEM file of the authority that signed the fleet's certificate.
    """

    address: str = field(default_factory=lambda: os.environ.get("ARGOSY_ADDRESS", "127.0.0.1:8443"))
    api_key: str = field(default_factory=lambda: os.environ.get("ARGOSY_API_KEY", ""), repr=False)
    ca: Path | None = field(default_factory=lambda: Path(value) if (value := os.environ.get("ARGOSY_CA")) else None)

    @property
    def plaintext(self) -> bool:
        """No certificate was named, and the address does not leave this machine."""
        host = self.address.removeprefix("dns:///").rpartition(":")[0].strip("[]")
        return self.ca is None and (self.address.startswith("unix:") or host in ("127.0.0.1", "localhost", "::1"))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes along with a call made now: the credential, and the caller's current trace if its program traces itself."""
        carrier: dict[str, str] = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        if _PROPAGATOR is not None:
            _PROPAGATOR.inject(carrier)  # W3C traceparent and tracestate; nothing where there is no span
        return tuple(carrier.items())

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.read_bytes() if self.ca else None)

    def open(self) -> grpc.Channel:
        """A channel for the blocking client; closing it is the caller's."""
        if self.plaintext:
            return grpc.insecure_channel(self.address, options=_OPTIONS)
        return grpc.secure_channel(self.address, self._credentials(), options=_OPTIONS)

    def open_aio(self) -> aio.Channel:
        """A channel for the running event loop; closing it is the caller's."""
        if self.plaintext:
            return aio.insecure_channel(self.address, options=_OPTIONS)
        return aio.secure_channel(self.address, self._credentials(), options=_OPTIONS)
