"""A certificate authority, and Secrets as a kubelet mounts and renews them: files behind a symlink that is swapped."""

import datetime as dt
import ipaddress
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.chassis.certificates import ClientTls

HOUR = dt.timedelta(hours=1)
_numbers = itertools.count(1)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


class Authority:
    """Signs certificates. Two of the same name are still two."""

    def __init__(self, name: str = "argosy") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {next(_numbers)}")])
        now = dt.datetime.now(dt.UTC)
        made = self._builder(self.name, self.key, now - HOUR, now + 1_000 * HOUR)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self.pem = made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    @classmethod
    def of(cls, pem: bytes, key: bytes) -> Self:
        """One that signed before."""
        made, known = cls(), serialization.load_pem_private_key(key, None)
        assert isinstance(known, ec.EllipticCurvePrivateKey)
        made.pem, made.key, made.name = pem, known, x509.load_pem_x509_certificate(pem).subject
        return made

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, begins: dt.datetime, ends: dt.datetime
    ) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
        return made.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)

    def issue(
        self,
        *names: str,
        spiffe: str = "",
        begins: dt.timedelta = -HOUR,
        ends: dt.timedelta = HOUR,
    ) -> tuple[bytes, bytes]:
        """A certificate for `names`, of DNS or IP, and a SPIFFE id, valid between two moments from now; chain and key in PEM."""
        key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"leaf {next(_numbers)}")])
        others: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names
        ]
        others += [x509.UniformResourceIdentifier(spiffe)] if spiffe else []
        made = self._builder(subject, key, now + begins, now + ends).add_extension(x509.SubjectAlternativeName(others), critical=False)
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), _pem_key(key)


class Secret:
    """A mounted folder with tls.crt, tls.key and ca.crt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.certificate, self.private_key, self.ca = folder / "tls.crt", folder / "tls.key", folder / "ca.crt"
        for path in (self.certificate, self.private_key, self.ca):
            path.symlink_to(Path("..data") / path.name)

    def tls(self) -> ClientTls:
        """A client's settings of these files."""
        return ClientTls(self.ca, self.certificate, self.private_key)

    def put(self, pair: tuple[bytes, bytes], authorities: Sequence[Authority]) -> "Secret":
        """All three at once, as a kubelet does."""
        data = self.folder / f"..{next(_numbers)}"
        data.mkdir()
        (data / "tls.crt").write_bytes(pair[0])
        (data / "tls.key").write_bytes(pair[1])
        (data / "ca.crt").write_bytes(b"".join(authority.pem for authority in authorities))
        swap = self.folder / "..data_tmp"
        swap.symlink_to(data.name)
        swap.replace(self.folder / "..data")
        return self


def secret(folder: Path, authority: Authority, *names: str, spiffe: str = "") -> Secret:
    """A Secret with a new certificate of `authority`, who is trusted too."""
    return Secret(folder).put(authority.issue(*names, spiffe=spiffe), [authority])
