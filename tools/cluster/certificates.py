"""The cluster's certificates and kubeconfigs: one authority a cluster, elliptic-curve keys, a month of validity."""

import base64
import datetime as dt
import ipaddress
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = dt.timedelta(days=30)
CLOCK_SKEW = dt.timedelta(minutes=5)


@dataclass(frozen=True)
class Pair:
    """A certificate and its key as files."""

    certificate: Path
    key: Path


class Authority:
    """Issues into one folder; the key of the authority itself never leaves the process."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, mode=0o700)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = _usage(signs_certificates=True)
        own = self._builder(self._name, self._key.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = folder / "ca.crt"
        self.certificate.write_bytes(
            own.add_extension(usage, critical=True).sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )

    def server(self, name: str, hosts: Sequence[str]) -> Pair:
        """For a listener: `hosts` are the names and addresses by which it is dialled."""
        alternatives: list[x509.GeneralName] = []
        for host in hosts:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
            except ValueError:
                alternatives.append(x509.DNSName(host))
        return self._issue(name, name, None, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)

    def client(self, name: str, user: str, group: str | None = None) -> Pair:
        """For a user of the API; user and group are the names on which Kubernetes' own roles are keyed."""
        return self._issue(name, user, group, ExtendedKeyUsageOID.CLIENT_AUTH, [])

    def signing_key(self, name: str) -> Pair:
        """A key pair that signs tokens; `certificate` is the bare public key."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        return self._write(name, public, key)

    def kubeconfig(self, server: str, pair: Pair, target: Path) -> Path:
        """Write a kubeconfig that holds everything, so that it works from any folder. JSON, which is YAML."""

        def inline(path: Path) -> str:
            return base64.b64encode(path.read_bytes()).decode()

        cluster = {"server": server, "certificate-authority-data": inline(self.certificate)}
        user = {"client-certificate-data": inline(pair.certificate), "client-key-data": inline(pair.key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "argosy-test", "cluster": cluster}],
            "users": [{"name": "argosy-test", "user": user}],
            "contexts": [{"name": "argosy-test", "context": {"cluster": "argosy-test", "user": "argosy-test"}}],
            "current-context": "argosy-test",
        }
        _write_private(target, json.dumps(config, indent=1).encode())
        return target

    def _issue(self, name: str, common: str, group: str | None, use: x509.ObjectIdentifier, alternatives: list[x509.GeneralName]) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group)] if group else []
        builder = self._builder(x509.Name([*subject, x509.NameAttribute(NameOID.COMMON_NAME, common)]), key.public_key())
        builder = builder.add_extension(_usage(signs_certificates=False), critical=True).add_extension(
            x509.ExtendedKeyUsage([use]), critical=False
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        return self._write(name, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), key)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + VALID)
        )

    def _write(self, name: str, public: bytes, key: ec.EllipticCurvePrivateKey) -> Pair:
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(public)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        _write_private(pair.key, private)
        return pair


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, key_cert_sign=signs_certificates, crl_sign=signs_certificates, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
