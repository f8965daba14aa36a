"""The way to the fine-tuning service: one channel, and callers signed for it. Without an address fine-tuning is off."""

import time
from typing import Any

import grpc
import grpc.aio

from services.chassis.channel import LastingChannel
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner
from services.chassis.telemetry import Telemetry

AUDIENCE = "argosy.finetune"  # what its CallerVerifier is made with
LONGEST_CALL_S = 3_700.0  # its watches last an hour

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
        self._channel = None if self.off else LastingChannel(address, credentials=credentials)

    @property
    def channel(self) -> Any:
        """The channel, as a grpc.aio.Channel; None where fine-tuning is off."""
        return self._channel

    def metadata(self, caller: Caller) -> Metadata:
        """The signed caller for one call, and the trace it belongs to."""
        return self._telemetry.inject(((CALLER_KEY, self._signer.sign(caller, AUDIENCE, time.time())),))

    def watch_call(self, method: str, call: Any) -> None:
        """Measure a call of ours."""
        self._telemetry.watch_call(method, call)

    def renew(self, credentials: grpc.ChannelCredentials) -> None:
        """Show it these credentials from the next call on."""
        if self._channel is not None:
            self._channel.renew(credentials, LONGEST_CALL_S)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
