"""EndpointSlices and pods as values."""

from typing import Any

import pytest

from services.gateway.endpoints import Endpoint, broken_devices, view


def endpoint(uid: str | None = "u1", *addresses: str, **conditions: bool | None) -> dict[str, Any]:
    made: dict[str, Any] = {"addresses": list(addresses or ("10.0.0.1",)), "conditions": conditions}
    return made if uid is None else {**made, "targetRef": {"kind": "Pod", "uid": uid}}


def slice_of(*endpoints: dict[str, Any], model: str = "chat", name: str = "s", port: str = "grpc", kind: str = "IPv4") -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": f"argosy-{model}", "argosy.dev/model": model}
    meta = {"name": name, "namespace": "models", "labels": labels}
    ports = [{"name": "x", "port": 1}, {"name": port, "port": 8500}]
    return {"metadata": meta, "addressType": kind, "ports": ports, "endpoints": endpoints}


def test_an_endpoint_is_a_replica_and_its_service_the_name_in_its_certificate() -> None:
    seen = view([slice_of(endpoint(ready=True, serving=True, terminating=False))])
    assert seen.endpoints == {"u1": Endpoint("u1", "10.0.0.1:8500", "argosy-chat.models.svc", "models/chat")}
    assert seen.models == {"models/chat"} and seen.endpoints["u1"].offered


@pytest.mark.parametrize(
    "conditions, offered",
    [({"ready": True}, True), ({}, True), ({"ready": None}, True), ({"ready": False}, False),
     ({"ready": False, "terminating": True}, False), ({"ready": True, "terminating": True}, False)],
)  # fmt: skip
def test_what_is_ready_and_not_terminating_takes_new_work(conditions: dict[str, bool | None], offered: bool) -> None:
    (found,) = view([slice_of(endpoint(**conditions))]).endpoints.values()
    assert found.offered is offered


def test_a_service_may_say_how_long_its_model_takes_to_load() -> None:
    for says, load_s in (("90", {"models/chat": 90.0}), ("soon", {}), ("", {})):
        made = slice_of()
        made["metadata"]["labels"]["argosy.dev/load-seconds"] = says
        assert view([made]).load_s == load_s


def test_an_empty_slice_is_a_model_that_sleeps() -> None:
    sleeping = {**slice_of(), "ports": None, "endpoints": None}
    assert view([sleeping]).models == {"models/chat"} and not view([sleeping]).endpoints


def test_a_pod_of_two_address_families_is_one_replica() -> None:
    six = slice_of(endpoint("u1", "fd00::1", ready=True), kind="IPv6", name="a")
    assert [each.address for each in view([six, slice_of(endpoint(ready=True))]).endpoints.values()] == ["10.0.0.1:8500"]
    assert [each.address for each in view([six]).endpoints.values()] == ["[fd00::1]:8500"]


def test_of_two_words_on_one_pod_terminating_is_right_and_else_ready() -> None:
    def both(one: dict[str, Any], two: dict[str, Any]) -> Endpoint:
        (found,) = view([slice_of(one, name="a"), slice_of(two, name="b")]).endpoints.values()
        (turned,) = view([slice_of(two, name="a"), slice_of(one, name="b")]).endpoints.values()
        assert found == turned
        return found

    assert both(endpoint(ready=False), endpoint(ready=True)).offered
    going = both(endpoint(ready=True), endpoint(ready=False, terminating=True))
    assert going.terminating and not going.ready


@pytest.mark.parametrize(
    "odd",
    [
        slice_of(endpoint(), port="http"),
        slice_of(endpoint(), kind="FQDN"),
        {**slice_of(endpoint()), "ports": None},
        slice_of({"addresses": None, "conditions": None}),
        {"metadata": {}},
        {},
    ],
)
def test_what_cannot_be_dialled_is_passed_over(odd: dict[str, Any]) -> None:
    assert not view([odd]).endpoints


def test_an_endpoint_without_a_pod_is_known_by_its_address() -> None:
    assert list(view([slice_of(endpoint(None))]).endpoints) == ["10.0.0.1:8500"]


def pod(uid: str, *healths: str) -> dict[str, Any]:
    devices = [{"resourceID": f"gpu-{n}", "health": health} for n, health in enumerate(healths)]
    status = {"containerStatuses": [{"allocatedResourcesStatus": [{"name": "nvidia.com/gpu", "resources": devices}]}, {"name": "x"}]}
    return {"metadata": {"uid": uid}, "status": status}


def test_a_pod_with_a_broken_device_gets_no_new_work() -> None:
    pods = [pod("u1", "Unhealthy", "Unhealthy"), pod("u2", "Healthy"), pod("u3", "Unknown"), {"metadata": {"uid": "u4"}}]
    assert broken_devices(pods) == {"u1": 2}
    seen = view([slice_of(endpoint("u1"), endpoint("u2", "10.0.0.2"))], frozenset(broken_devices(pods)))
    assert [seen.endpoints[uid].offered for uid in ("u1", "u2")] == [False, True]
