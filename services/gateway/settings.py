"""The gateway's variables; `services.chassis.settings.read` fills them from the environment."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from services.chassis.certificates import CertificateRefused, ClientTls
from services.chassis.server import Listener


@dataclass(frozen=True)
class Placing:
    """How calls are placed on replicas."""

    streams_per_replica: int = field(default=256, metadata={"minimum": 1})  # running at once, from this gateway
    unary_per_replica: int = field(default=64, metadata={"minimum": 1})
    queue_calls: int = field(default=1_024, metadata={"minimum": 0})  # waiting at once, a model and budget; time bounds it first
    queue_seconds: float = field(default=14.0, metadata={"minimum": 0.0})  # no caller hears nothing for longer than 15 s
    start_seconds: float = field(default=0.2, metadata={"minimum": 0.0})  # a replica predicted to begin later gets no more for now
    attempt_seconds: float = field(default=10.0, metadata={"minimum": 0.1})  # a replica that has not accepted by then is passed over
    abort_seconds: float = field(default=5.0, metadata={"minimum": 0.1})  # an aborted call ends in a step; later its bill is given up
    write_stall_seconds: float = field(default=30.0, metadata={"minimum": 0.1})  # A4
    output_token_ceiling: int = field(  # of one output, where project and key set none
        default=4_096, metadata={"minimum": 1, "maximum": 262_144}
    )


@dataclass(frozen=True)
class GatewaySettings:
    """One gateway process."""

    listener: Listener = field(default_factory=Listener)
    placing: Placing = field(default_factory=Placing)
    # The longest that a call may take: its deadline if it names none, and what a drain has to wait for.
    max_stream_seconds: float = field(default=300.0, metadata={"minimum": 1.0, "maximum": 86_400.0})
    inference_addresses: tuple[str, ...] = ()  # host:port of each replica, where no cluster lists them
    model_namespaces: tuple[str, ...] = ()  # of a Kubernetes cluster, whose EndpointSlices list the replicas; empty: no cluster is asked
    scaler_address: str = ""  # host:port of KEDA's external scaler, over mutual TLS off this machine; empty: none
    gpu_health: bool = False  # new work only for pods without an Unhealthy device; reads pods, which needs the right to
    tls: ClientTls = field(default_factory=ClientTls)
    finetune_address: str = ""  # host:port of the fine-tuning service; empty: fine-tuning is off
    caller_signing_key: Path | None = None  # PEM, Ed25519; signs the caller for the replicas
    caller_signing_kid: str = "gateway"
    key_pepper: str = field(default="", repr=False)  # 64 hex digits, secret: without it no stored key can be checked
    key_environment: str = "live"  # [a-z]{1,16}: part of each new API key's text
    page_token_key: str = field(default="", repr=False)  # 64 hex digits, secret, the same for every gateway; empty: drawn at start

    def inside(self, address: str) -> Listener:
        """A listener for our own kind, as scrapers and scalers are: with the fleet's certificate where there is one, and its CA.

        The public one may show the world another certificate, and asks callers for none.

        Raises:
            CertificateRefused: it would have a certificate, and know nobody else's.
        """
        tls, shown = self.tls, self.listener
        certificate = tls.tls_certificate or shown.certificate
        ca = None if certificate is None else shown.client_ca or tls.tls_ca
        if certificate is not None and ca is None:
            raise CertificateRefused(
                "who may ask the scaler or for metrics is known by certificate: set the client CA, or our services' CA"
            )
        key = tls.tls_private_key or shown.private_key
        return replace(shown, address=address, certificate=certificate, private_key=key, client_ca=ca, health_address="", reflection=False)
