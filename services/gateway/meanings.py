"""What a project's own names mean, as finetune last said: fresh for 2 s, believed for minutes while finetune is away (pure).

Keyed by project: no name of one is ever looked up for another. Time is monotonic seconds.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

FRESH_S = 2.0  # a moved alias is followed within it, even where nobody told us
KNOWN_S = 600.0  # an alias that cannot be asked for means what it meant (F15)
MODELS, NAMES_A_MODEL = 10_000, 64  # kept; what changed longest ago goes first


@dataclass(frozen=True, slots=True)
class Target:
    """One version that a name means."""

    version: str  # projects/{p}/models/{m}/versions/{n}
    base: str  # models/{m}
    digest: str  # of the base
    adapter: str  # of the signed manifest
    capabilities: frozenset[str] = frozenset()  # ModelCapability without its prefix
    percent: int = 100
    private: bool = False


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name means: one version, or two while an alias is split, the stable one first."""

    targets: tuple[Target, ...]
    alias: str = ""  # the alias that was followed; empty: none
    sequence: int = 0  # of the last change that it takes into account


def pick(meaning: Meaning, sticky: str) -> Target:
    """The version that callers with this key get. More percent takes callers over and gives none back; each alias draws anew."""
    *newer, stable = reversed(meaning.targets)
    if newer:
        drawn = hashlib.blake2b(sticky.encode(), key=hashlib.sha256(meaning.alias.encode()).digest(), digest_size=8).digest()
        place = int.from_bytes(drawn, "big") * 100 >> 64
        for target in newer:
            if place < target.percent:
                return target
            place -= target.percent
    return stable


def model_of(name: str) -> str:
    """The model that a version or an alias belongs to, by resource name."""
    return "/".join(name.split("/")[:4])


@dataclass(slots=True)
class _Known:
    meaning: Meaning
    at: float  # when it was asked for
    fresh: bool = True


@dataclass(slots=True)
class _Model:
    """What is known of one model."""

    names: dict[str, _Known] = field(default_factory=dict)
    moved: int = 0  # its last change that we were told of


@dataclass
class Meanings:
    """The names that were asked for of late."""

    _models: "OrderedDict[tuple[str, str], _Model]" = field(default_factory=OrderedDict)  # by project uid and resource name

    def fresh(self, project_uid: str, name: str, now: float) -> Meaning | None:
        """What it means, if that was asked a moment ago and nothing has changed since."""
        known = self._known(project_uid, name)
        return known.meaning if known is not None and known.fresh and now - known.at < FRESH_S else None

    def last(self, project_uid: str, name: str, now: float) -> Meaning | None:
        """What it meant the last time that finetune could be asked."""
        known = self._known(project_uid, name)
        return known.meaning if known is not None and now - known.at < KNOWN_S else None

    def learn(self, project_uid: str, name: str, meaning: Meaning, asked_at: float) -> None:
        """Finetune has answered. An answer older than a change that we were told of is not fresh."""
        model = self._model(project_uid, model_of(name))
        model.names.pop(name, None)
        model.names[name] = _Known(meaning, asked_at, meaning.sequence >= model.moved)
        while len(model.names) > NAMES_A_MODEL:
            del model.names[next(iter(model.names))]

    def forget(self, project_uid: str, name: str) -> None:
        """It means nothing any more."""
        if model := self._models.get((project_uid, model_of(name))):
            model.names.pop(name, None)

    def moved(self, project_uid: str, model: str, sequence: int) -> None:
        """Names of this model mean something else from now on."""
        found = self._model(project_uid, model)
        found.moved = sequence
        for known in found.names.values():
            known.fresh = known.fresh and known.meaning.sequence >= sequence

    def erased(self, project_uid: str, version: str, adapter: str) -> None:
        """No name may mean this version any more, not even while finetune is away."""
        if model := self._models.get((project_uid, model_of(version))):
            for name, known in tuple(model.names.items()):
                if any(target.version == version or target.adapter == adapter for target in known.meaning.targets):
                    del model.names[name]

    def _known(self, project_uid: str, name: str) -> _Known | None:
        model = self._models.get((project_uid, model_of(name)))
        return None if model is None else model.names.get(name)

    def _model(self, project_uid: str, model: str) -> _Model:
        found = self._models.setdefault((project_uid, model), _Model())
        self._models.move_to_end((project_uid, model))
        while len(self._models) > MODELS:
            self._models.popitem(last=False)
        return found
