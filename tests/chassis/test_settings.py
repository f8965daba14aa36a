from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from services.chassis.server import Listener
from services.chassis.settings import SettingsError, names, read


@dataclass(frozen=True)
class Inner:
    address: str = "127.0.0.1:0"


@dataclass(frozen=True)
class Sample:
    model: str
    drain_seconds: float = field(default=30.0, metadata={"minimum": 0, "maximum": 600})
    slots: int = field(default=8, metadata={"minimum": 1})
    reflection: bool = False
    folder: Path = Path("/tmp")
    replicas: tuple[str, ...] = ()
    api_key: int = 1
    ceiling: int | None = 5
    backend: Literal["auto", "eager"] = "auto"
    inner: Inner = Inner()


def test_each_type_is_read() -> None:
    environ = {
        "ARGOSY_MODEL": "gemma", "ARGOSY_DRAIN_SECONDS": "2.5", "ARGOSY_SLOTS": "3", "ARGOSY_REFLECTION": "Yes", "ARGOSY_FOLDER": "/data",
        "ARGOSY_REPLICAS": "a:1, b:2,", "ARGOSY_CEILING": "", "ARGOSY_BACKEND": "eager", "ARGOSY_ADDRESS": "127.0.0.1:7", "PATH": "/bin",
    }  # fmt: skip
    assert read(Sample, environ) == Sample("gemma", 2.5, 3, True, Path("/data"), ("a:1", "b:2"), 1, None, "eager", Inner("127.0.0.1:7"))


def test_defaults_stand() -> None:
    assert read(Sample, {"ARGOSY_MODEL": "m"}) == Sample("m")


def test_all_bad_variables_are_told_at_once() -> None:
    environ = {
        "ARGOSY_DRAIN_SECONDS": "soon", "ARGOSY_SLOTS": "0", "ARGOSY_REFLECTION": "maybe", "ARGOSY_BACKEND": "fast",
        "ARGOSY_DRAIN_SECOND": "3", "ARGOSY_API_KEY": "hunter2", "ARGOSY_CEILING": "1.5",
    }  # fmt: skip
    with pytest.raises(SettingsError) as error:
        read(Sample, environ)
    assert error.value.problems == (
        "ARGOSY_MODEL must be set",
        "ARGOSY_DRAIN_SECONDS must be a number, not 'soon'",
        "ARGOSY_SLOTS must be at least 1, not '0'",
        "ARGOSY_REFLECTION must be true or false, not 'maybe'",
        "ARGOSY_API_KEY must be a whole number",  # no value: the name looks like a secret's
        "ARGOSY_CEILING must be a whole number, not '1.5'",
        "ARGOSY_BACKEND must be one of auto, eager, not 'fast'",
        "ARGOSY_DRAIN_SECOND is not known; did you mean ARGOSY_DRAIN_SECONDS?",
    )


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "601"])
def test_a_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="ARGOSY_DRAIN_SECONDS"):
        read(Sample, {"ARGOSY_MODEL": "m", "ARGOSY_DRAIN_SECONDS": text})


def test_a_stranger_is_a_warning_and_a_neighbour_is_none(caplog: pytest.LogCaptureFixture) -> None:
    @dataclass(frozen=True)
    class Neighbour:
        drain_second: int = 1

    environ = {"ARGOSY_MODEL": "m", "ARGOSY_UNHEARD_OF": "1", "ARGOSY_DRAIN_SECOND": "2", "ARGOSY_SLOT_SERVICE_HOST": "10.0.0.1"}
    assert read(Sample, environ, also=[Neighbour]) == Sample("m")
    assert [record.getMessage() for record in caplog.records] == ["ARGOSY_UNHEARD_OF is not a variable of this service"]


def test_service_links_of_kubernetes_are_not_ours() -> None:
    environ = {"ARGOSY_MODEL": "m", "ARGOSY_SLOTS_PORT": "tcp://10.0.0.1:1", "ARGOSY_SLOTS_PORT_1_TCP_ADDR": "10.0.0.1"}
    assert read(Sample, environ) == Sample("m")


def test_rules_over_several_fields_are_told_too() -> None:
    with pytest.raises(SettingsError, match="private key are set together"):
        read(Listener, {"ARGOSY_CERTIFICATE": "/tls.crt"})


def test_names() -> None:
    assert list(names(Inner)) == ["ARGOSY_ADDRESS"]
