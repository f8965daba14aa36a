"""Which model answers to which name: what the replicas say they serve, and what a key may see of it (pure)."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from services.chassis.errors import ModelCapability, ModelNotServed, ResourceNotFound
from services.gateway.meanings import Target

TUNED = "CLASSIFY_TUNED"
BESIDE_A_HEAD = frozenset({"EMBED", "EXPLAIN", "SEED"})  # of a base, what is left to a version that was taught labels


@dataclass(frozen=True, slots=True)
class Served:
    """A model as a replica describes itself, or a version of a project's own on such a base."""

    name: str  # models/{m}, or projects/{p}/models/{m}/versions/{n}
    digest: str  # of weights and config, sha256 in hex: what is pinned at admission
    context_tokens: int  # prompt and output together
    capabilities: frozenset[str] = frozenset()  # ModelCapability without its prefix: "GENERATE", "EMBED"
    description: bytes = b""  # the replica's argosy.v1.Model, unopened here
    adapter: str = ""  # digest, pinned at admission with the base's (F11); empty: the base alone
    base: str = ""  # models/{m} that it builds on; empty: it is one

    @property
    def shared(self) -> str:
        """The base's name: few, and no tenant's, so that metrics may name it."""
        return self.base or self.name


class Catalog:
    """Names to models. A name nobody serves, and one outside the key's list, look the same (A10)."""

    def __init__(self) -> None:
        self._replicas: dict[str, Served] = {}
        self._asleep: dict[str, Served] = {}  # by the model's name: what its last replica said of it

    def serves(self, replica: str, served: Served) -> None:
        """A replica described itself. It keeps its place when it is unreachable for a while: a name does not come and go."""
        self._replicas[replica] = served
        self._asleep.pop(served.name, None)

    def forget(self, replica: str) -> None:
        """A replica left for good. The last of its model leaves its description behind: the model may only be asleep."""
        served = self._replicas.pop(replica, None)
        if served is not None and all(other.name != served.name for other in self._replicas.values()):
            self._asleep[served.name] = served

    def keep_asleep(self, names: Collection[str]) -> None:
        """Of the models without a replica only `names` are installed."""
        self._asleep = {name: served for name, served in self._asleep.items() if name in names}

    @property
    def empty(self) -> bool:
        """No replica has ever described itself: nothing is known yet."""
        return not self._replicas and not self._asleep

    def tuned(self, target: Target, *, field: str = "model") -> Served:
        """A version of a project's own, with what its base can do.

        Raises:
            ModelNotServed: no replica serves its base.
        """
        base = next((served for served in self._known() if served.digest == target.digest), None)
        if base is None:
            raise ModelNotServed(field)
        return Served(
            name=target.version,
            digest=base.digest,
            context_tokens=base.context_tokens,
            capabilities=offered(base.capabilities, has_head=TUNED in target.capabilities),
            description=base.description,
            adapter=target.adapter,
            base=base.name,
        )

    def resolve(self, name: str, allowed: Iterable[str] = (), *, field: str = "model") -> Served:
        """The model that answers to `name` for a key whose list is `allowed` (empty: all).

        Raises:
            ResourceNotFound: nobody serves it, or the key may not see it.
        """
        served = self._by_name().get(name)
        permitted = frozenset(allowed)
        if served is None or (permitted and name not in permitted):
            raise ResourceNotFound(field)
        return served

    def visible(self, allowed: Iterable[str] = ()) -> list[Served]:
        """All models a key may see, by name."""
        permitted = frozenset(allowed)
        return [served for name, served in sorted(self._by_name().items()) if not permitted or name in permitted]

    def base(self, name: str, digest: str = "") -> Served | None:
        """The base of this name, with these weights if `digest` says which; None: nobody serves it."""
        found = self._by_name().get(name)
        if found is None or not digest or found.digest == digest:
            return found
        return next((served for served in self._known() if served.digest == digest), None)

    def replicas(self, digest: str) -> frozenset[str]:
        """Names of the replicas that serve these weights."""
        return frozenset(name for name, served in self._replicas.items() if served.digest == digest)

    def _known(self) -> Iterator[Served]:
        yield from self._replicas.values()
        yield from self._asleep.values()

    def _by_name(self) -> dict[str, Served]:
        """While a new version rolls out two digests share a name: the one most replicas serve answers."""
        counts = Counter((served.name, served.digest) for served in self._replicas.values())
        best = dict(self._asleep)
        for served in sorted(self._replicas.values(), key=lambda s: (counts[s.name, s.digest], s.digest)):
            best[served.name] = served
        return best


def offered(base: frozenset[str], *, has_head: bool) -> frozenset[str]:
    """What a version can do on a base. One with a head classifies by it; its adapter was taught nothing else, so it writes no text."""
    return base & BESIDE_A_HEAD | {TUNED} if has_head else base - {TUNED}


def require(served: Served, capability: str, *, field: str = "model") -> None:
    """Raise ModelCapability unless the model has `capability`."""
    if capability not in served.capabilities:
        raise ModelCapability(field, capability)
