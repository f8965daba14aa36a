"""The gateway's settings where one depends on another, and what a process says of files it cannot use."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.chassis.certificates import CertificateRefused
from services.chassis.server import Listener
from services.gateway.settings import GatewaySettings
from tests.fakes.authority import HOUR, Authority, Secret, secret

ROOT = Path(__file__).parents[2]


def test_our_own_kind_is_shown_the_fleet_s_certificate_and_asked_for_one(tmp_path: Path) -> None:
    public, own = secret(tmp_path / "public", Authority()), secret(tmp_path / "own", Authority())
    listener = Listener("0.0.0.0:8443", public.certificate, public.private_key, health_address="0.0.0.0:8081", reflection=True)
    inside = GatewaySettings(listener=listener, tls=own.tls()).inside("0.0.0.0:8444")
    assert inside == Listener("0.0.0.0:8444", own.certificate, own.private_key, own.ca)
    demanding = GatewaySettings(listener=replace(listener, client_ca=public.ca), tls=own.tls()).inside("0.0.0.0:8444")
    assert (demanding.certificate, demanding.client_ca) == (own.certificate, public.ca)
    assert GatewaySettings().inside("127.0.0.1:0") == Listener("127.0.0.1:0")
    with pytest.raises(CertificateRefused, match="set the client CA, or our services' CA"):
        GatewaySettings(listener=listener).inside("0.0.0.0:8444")


def test_F30_a_gateway_with_an_expired_certificate_says_so_in_one_line(tmp_path: Path) -> None:
    authority = Authority()
    files = Secret(tmp_path / "old").put(authority.issue("x", begins=-2 * HOUR, ends=-HOUR), [authority])
    environment = {
        "ARGOSY_KEY_PEPPER": "5a" * 32,
        "ARGOSY_JOURNAL_DIR": str(tmp_path / "journal"),
        "ARGOSY_DATABASE_URL": "postgresql://x@127.0.0.1:1/x",
        "ARGOSY_CERTIFICATE": str(files.certificate),
        "ARGOSY_PRIVATE_KEY": str(files.private_key),
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"{files.certificate} has ended: it was valid until 20")
    assert "Traceback" not in done.stderr
