"""What a cluster says of the replicas: EndpointSlices and pods as its API writes them, read into values (pure)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LABELS = "app.kubernetes.io/part-of=argosy,app.kubernetes.io/component=model"
MODEL = "argosy.dev/model"
LOAD_SECONDS = "argosy.dev/load-seconds"
SERVICE = "kubernetes.io/service-name"
PORT = "grpc"
ADDRESSES = ("IPv4", "IPv6")  # in this order, where a pod has both; a name (FQDN) is nobody's pod

Object = Mapping[str, Any]  # as JSON: any key may be missing, or null


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one replica can be reached, and what its cluster says of it."""

    uid: str  # of the pod; an address may be another pod's tomorrow
    address: str  # host:port
    server_name: str = ""  # that its certificate must bear; empty: the host of `address`
    model: str = ""  # `models/{m}` that it serves; empty: not said
    ready: bool = True
    terminating: bool = False
    healthy: bool = True  # no device of the pod is known to be broken

    @property
    def offered(self) -> bool:
        """Whether it may be given new work. What it has already goes on in any case."""
        return self.ready and not self.terminating and self.healthy


@dataclass(frozen=True, slots=True)
class View:
    """The replicas of some namespaces at one moment."""

    endpoints: Mapping[str, Endpoint]  # by uid
    models: frozenset[str] = frozenset()  # `models/{m}` of every model that is installed, replicas or none
    load_s: Mapping[str, float] = field(default_factory=dict)  # by model: how long a replica takes to load, where its Service says so


def view(slices: Iterable[Object], broken: frozenset[str] = frozenset()) -> View:
    """The replicas in `slices`; `broken` are the uids of pods with a device that is not well.

    A pod may be in several slices: in one of each address family, and for a moment in two of one Service. Any that says it is terminating
    is right; any that says it is ready is right of a pod that is not.
    """
    found: dict[str, Endpoint] = {}
    models: set[str] = set()
    load_s: dict[str, float] = {}
    for each in sorted(slices, key=_order):
        labels = _labels(each)
        if model := labels.get(MODEL):
            models.add(f"models/{model}")
            if (seconds := labels.get(LOAD_SECONDS, "")).isdigit():
                load_s[f"models/{model}"] = float(seconds)
        for endpoint in _endpoints(each, labels, broken):
            known = found.setdefault(endpoint.uid, endpoint)
            terminating = known.terminating or endpoint.terminating
            found[endpoint.uid] = replace(known, ready=(known.ready or endpoint.ready) and not terminating, terminating=terminating)
    return View(found, frozenset(models), load_s)


def broken_devices(pods: Iterable[Object]) -> Counter[str]:
    """By uid of their pods, the allocated devices that their plugin calls Unhealthy (`allocatedResourcesStatus`). The pods run on."""
    return Counter(
        str(pod["metadata"]["uid"])
        for pod in pods
        for container in (pod.get("status") or {}).get("containerStatuses") or ()
        for resource in container.get("allocatedResourcesStatus") or ()
        for device in resource.get("resources") or ()
        if device.get("health") == "Unhealthy"
    )


def _order(each: Object) -> tuple[int, str, str]:
    meta, kind = each.get("metadata") or {}, each.get("addressType")
    return ADDRESSES.index(kind) if kind in ADDRESSES else len(ADDRESSES), meta.get("namespace", ""), meta.get("name", "")


def _labels(each: Object) -> Mapping[str, str]:
    return (each.get("metadata") or {}).get("labels") or {}


def _endpoints(each: Object, labels: Mapping[str, str], broken: frozenset[str]) -> Iterable[Endpoint]:
    port = next((port.get("port") for port in each.get("ports") or () if port.get("name") == PORT), None)
    if port is None or each.get("addressType") not in ADDRESSES:
        return
    service, namespace = labels.get(SERVICE, ""), (each.get("metadata") or {}).get("namespace", "")
    for endpoint in each.get("endpoints") or ():
        # Consumers use the first address alone: the API promises that all are equal, and writes one.
        for host in (endpoint.get("addresses") or ())[:1]:
            conditions = endpoint.get("conditions") or {}
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            uid = (endpoint.get("targetRef") or {}).get("uid") or address
            yield Endpoint(
                uid=uid,
                address=address,
                model=f"models/{labels[MODEL]}" if labels.get(MODEL) else "",
                server_name=f"{service}.{namespace}.svc" if service else "",
                ready=conditions.get("ready") is not False,  # null means yes
                terminating=bool(conditions.get("terminating")),
                healthy=uid not in broken,
            )
