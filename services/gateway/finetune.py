"""The way to the fine-tuning service: one channel, and callers signed for it. Without an address fine-tuning is off."""

import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from services.chassis.channel import open_channel
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner
from services.chassis.telemetry import Telemetry
from services.gateway.settings import GatewaySettings

AUDIENCE = "argosy.finetune"  # what its CallerVerifier is made with

Metadata = tuple[tuple[str, str | bytes], ...]


class FineTune:
    """A channel to finetune. Use `close()` when done."""

    def __init__(
        self, address: str, *, signer: CallerSigner, credentials: grpc.ChannelCredentials | None = None, telemetry: Telemetry | None = None
    ) -> None:
        """`address` empty: off; every call then needs to ask `off` first."""
        self.off = not address
        self._signer = signer
        self._telemetry = telemetry or Telemetry.off()
        self._channel = None if self.off else open_channel(address, credentials=credentials)

    @property
    def channel(self) -> Any:
        """The channel, a grpc.aio.Channel; None where fine-tuning is off."""
        return self._channel

    def metadata(self, caller: Caller) -> Metadata:
        """The signed caller for one call, and the trace it belongs to."""
        return self._telemetry.inject(((CALLER_KEY, self._signer.sign(caller, AUDIENCE, time.time())),))

    def watch_call(self, method: str, call: Any) -> None:
        """Measure a call of ours."""
        self._telemetry.watch_call(method, call)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close(None)


def credentials(settings: GatewaySettings) -> grpc.ChannelCredentials | None:
    """TLS towards finetune, mutual if we have a certificate to show; None: plaintext, on this machine only."""
    if settings.finetune_ca is None:
        return None

    def read(path: Path | None) -> bytes | None:
        return path.read_bytes() if path is not None else None

    return grpc.ssl_channel_credentials(
        settings.finetune_ca.read_bytes(), read(settings.finetune_private_key), read(settings.finetune_certificate)
    )
