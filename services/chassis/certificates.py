"""Certificates that somebody renews under a running process: read again when their files change, and never half of a pair.

A kubelet swaps a symlink, so that all files of a Secret change at once; what is read across the swap does not fit together and is read
again. Files that cannot be used change nothing: what was read before stays in use, and the log says why.
"""

import asyncio
import datetime
import logging
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from services.chassis.telemetry import Telemetry

log = logging.getLogger(__name__)

LOOK_S = 10.0  # a renewed file is in use within this; a kubelet takes a minute or two to show it
LOW_LIFE = 0.25  # of a certificate's life: whoever renews it is late


class CertificateRefused(ValueError):
    """Files that cannot be used; one sentence says why."""


@dataclass(frozen=True)
class Material:
    """What the files held, checked."""

    ca: bytes | None
    chain: bytes | None
    key: bytes | None = field(repr=False)
    begins: datetime.datetime | None = None  # of the chain's first certificate; None: there is none
    ends: datetime.datetime | None = None

    def remaining_s(self, now: datetime.datetime) -> float | None:
        """Seconds until the certificate ends, negative after."""
        return None if self.ends is None else (self.ends - now).total_seconds()

    def life(self, now: datetime.datetime) -> float | None:
        """Share of its life that is left, 0..1."""
        if self.ends is None or self.begins is None:
            return None
        return min(1.0, max(0.0, (self.ends - now) / (self.ends - self.begins)))


class Certificates:
    """The files of one role, `server` or `client`. Safe from several threads: core asks from its own."""

    def __init__(self, role: str, *, ca: Path | None, certificate: Path | None, private_key: Path | None) -> None:
        """Reads them. Raises CertificateRefused."""
        self.role = role
        self._ca, self._certificate, self._private_key = ca, certificate, private_key
        self._lock = threading.Lock()
        self._seen = self._stats()
        self._material = self._read()
        self._version = self._shown = 1
        self._context: tuple[int, ssl.SSLContext] | None = None
        self._said: set[str] = set()  # of the material in use: what its age has made us say

    @property
    def material(self) -> Material:
        """What the files hold now; while they cannot be used, what they held before."""
        self.look()
        return self._material

    def look(self) -> int:
        """Read the files if they have changed; a number that rises with each change that is taken."""
        with self._lock:
            if (seen := self._stats()) != self._seen:
                try:
                    material = self._read()
                except CertificateRefused as refused:
                    if seen == self._stats():  # else it was read across a swap: the next look reads what stands then
                        self._seen = seen
                        log.error("the new %s certificate is not used: %s", self.role, refused)
                else:
                    self._material, self._seen = material, seen
                    self._version += 1
                    self._said.clear()
                    log.info("the %s certificate was read again and ends %s", self.role, material.ends or "never")
            return self._version

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel that is made now; it keeps them for its life."""
        self._shown, now = self.look(), self._material
        return grpc.ssl_channel_credentials(now.ca, now.key, now.chain)

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server: each handshake is made with what the files hold by then, and touches no stream. A CA makes clients show theirs."""
        given = 0

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if given == (version := self.look()):
                return None
            given, now = version, self._material
            assert now.key is not None and now.chain is not None  # the listener's settings go together
            return grpc.ssl_server_certificate_configuration([(now.key, now.chain)], root_certificates=now.ca)

        # The stubs know nothing of the None that says "as before".
        return grpc.dynamic_ssl_server_credentials(fetch(), fetch, self._ca is not None)  # type: ignore[arg-type]

    def ssl_context(self) -> ssl.SSLContext:
        """For one more connection to a server that is not gRPC's; the same demands on clients. Raises ssl.SSLError amid a swap."""
        version = self.look()
        if self._context is None or self._context[0] != version:
            assert self._certificate is not None and self._private_key is not None  # the listener's settings go together
            now = self._material
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=None if now.ca is None else now.ca.decode())
            context.load_cert_chain(self._certificate, self._private_key)
            context.verify_mode = ssl.CERT_NONE if now.ca is None else ssl.CERT_REQUIRED
            self._context = (version, context)
        return self._context[1]

    @asynccontextmanager
    async def watched(self, telemetry: Telemetry, changed: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
        """Look now and then while inside: measure what is left, say when it gets low, and await `changed` while channels show another."""

        async def look() -> None:
            while True:
                self.measure(telemetry)
                if changed is not None and self.look() != self._shown:
                    await changed()
                await asyncio.sleep(LOOK_S)

        looking = asyncio.create_task(look(), name=f"{self.role} certificate")
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait((looking,))

    def measure(self, telemetry: Telemetry) -> None:
        """Record how much of the certificate's life is left; say once that it is low, and once that it is over."""
        material, now = self.material, datetime.datetime.now(datetime.UTC)
        remaining_s, life = material.remaining_s(now), material.life(now)
        if remaining_s is None or life is None:
            return
        role = {"argosy.certificate": self.role}
        telemetry.record("argosy.certificate.remaining", remaining_s, role)
        telemetry.record("argosy.certificate.life", life, role)
        word = "has ended" if remaining_s <= 0 else "ends soon" if life < LOW_LIFE else ""
        if word and word not in self._said:
            self._said.add(word)
            log.error("the %s certificate %s: valid until %s, and nobody has renewed it", self.role, word, material.ends)

    def _stats(self) -> tuple[tuple[int, int, int], ...]:
        return tuple(_stat(path) for path in (self._ca, self._certificate, self._private_key) if path is not None)

    def _read(self) -> Material:
        ca, chain, key = (_bytes(path) for path in (self._ca, self._certificate, self._private_key))
        if ca is not None:
            _certificates(self._ca, ca)
        if chain is None or key is None:
            return Material(ca, None, None)
        leaf = _certificates(self._certificate, chain)[0]
        try:
            public = load_pem_private_key(key, password=None).public_key()
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CertificateRefused(f"{self._private_key} holds no private key in PEM without a password") from error
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if public.public_bytes(*form) != leaf.public_key().public_bytes(*form):
            raise CertificateRefused(f"{self._private_key} is not the key of {self._certificate}")
        begins, ends = leaf.not_valid_before_utc, leaf.not_valid_after_utc
        if ends <= datetime.datetime.now(datetime.UTC):
            raise CertificateRefused(f"{self._certificate} has ended: it was valid until {ends}")
        return Material(ca, chain, key, begins, ends)


@dataclass(frozen=True)
class ClientTls:
    """How a service shows itself to another of ours, and knows it. May be a field of a service's settings."""

    tls_ca: Path | None = None  # PEM, of who signs our services' certificates; without it they must be on this machine
    tls_certificate: Path | None = None  # PEM chain, what we show to them; read again when it changes
    tls_private_key: Path | None = None

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_private_key is None):
            raise ValueError("a client's certificate and its private key are set together or not at all")
        if self.tls_certificate is not None and self.tls_ca is None:
            raise ValueError("a client's certificate is only shown over TLS: set the CA that it may be shown to")

    def certificates(self) -> Certificates | None:
        """The files, read; None: plaintext. Raises CertificateRefused."""
        if self.tls_ca is None:
            return None
        return Certificates("client", ca=self.tls_ca, certificate=self.tls_certificate, private_key=self.tls_private_key)


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:  # for a moment, or for good: reading says which
        return 0, 0, 0
    return found.st_ino, found.st_mtime_ns, found.st_size


def _bytes(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateRefused(f"{path} cannot be read: {error.strerror}") from error


def _certificates(path: Path | None, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise CertificateRefused(f"{path} holds no certificate in PEM") from error
