"""A frozen dataclass read from the environment; every bad variable is reported at once.

The field `drain_seconds: float = 30.0` is read from `ARGOSY_DRAIN_SECONDS`. A field whose type is itself a dataclass is read from the same
prefix, its fields beside the others. Types: str, int, float, bool, Path, Literal, tuple[T, ...] (separated by commas), and T | None, where
an empty variable is None. A field's `metadata` may hold `minimum` and `maximum`.
"""

import dataclasses
import difflib
import logging
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

log = logging.getLogger(__name__)
PREFIX = "ARGOSY_"
T = TypeVar("T")

TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}
# Kubernetes puts these in every pod of a namespace that has a Service named argosy-…; nobody meant them for us.
SERVICE_LINK = re.compile(r"_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP)(_(ADDR|PORT|PROTO))?)?)$")
SECRET = re.compile(r"KEY|SECRET|TOKEN|PEPPER|PASSWORD|URL")


class SettingsError(Exception):
    """One or more variables are wrong; the message has a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(["The environment is not usable:", *(f"  {problem}" for problem in problems)]))
        self.problems = tuple(problems)


def read(cls: type[T], environ: Mapping[str, str] = os.environ, *, prefix: str = PREFIX, also: Sequence[type] = ()) -> T:
    """Return a `cls` filled from `environ`, or raise `SettingsError` with every problem.

    A variable under `prefix` that neither `cls` nor the classes of `also` (settings of neighbours in the same process) declare is an error
    if it resembles one of `cls`, and otherwise a warning in the log.
    """
    problems: list[str] = []
    settings = _read(cls, environ, prefix, problems)
    own = set(names(cls, prefix))
    known = own.union(*(names(neighbour, prefix) for neighbour in also))
    for name in sorted(n for n in environ if n.startswith(prefix) and n not in known and not SERVICE_LINK.search(n)):
        if near := difflib.get_close_matches(name, own, n=1, cutoff=0.85):
            problems.append(f"{name} is not known; did you mean {near[0]}?")
        else:
            log.warning("%s is not a variable of this service", name)
    if problems:
        raise SettingsError(problems)
    return typing.cast(T, settings)


def names(cls: type, prefix: str = PREFIX) -> Iterator[str]:
    """The variables that `cls` reads."""
    for field, kind in _fields(cls):
        if dataclasses.is_dataclass(kind):
            yield from names(typing.cast(type, kind), prefix)
        else:
            yield prefix + field.name.upper()


def _fields(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    kinds = typing.get_type_hints(cls)
    return ((field, kinds[field.name]) for field in dataclasses.fields(cls) if field.init)


def _read(cls: type, environ: Mapping[str, str], prefix: str, problems: list[str]) -> object:
    values: dict[str, object] = {}
    before = len(problems)
    for field, kind in _fields(cls):
        name = prefix + field.name.upper()
        if dataclasses.is_dataclass(kind):
            values[field.name] = _read(typing.cast(type, kind), environ, prefix, problems)
        elif name in environ:
            try:
                values[field.name] = _within(_parse(environ[name], kind), field.metadata)
            except ValueError as error:
                shown = "" if SECRET.search(name) else f", not {environ[name][:80]!r}"
                problems.append(f"{name} must be {error}{shown}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{name} must be set")
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:  # the class's own __post_init__: rules over several fields
        problems.append(str(error))
        return None


def _parse(text: str, kind: Any) -> Any:
    """`text` as a `kind`; a ValueError completes the sentence "X must be …"."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if text == "" else _parse(text, inner[0])
    if origin is tuple:
        return tuple(_parse(part.strip(), args[0]) for part in text.split(",") if part.strip())
    if origin is Literal:
        return _one_of(text, args)
    return _scalar(text, kind)


def _one_of(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ValueError(f"one of {', '.join(choices)}")
    return text


def _scalar(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError("true or false")
        return text.lower() in TRUE
    if kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            raise ValueError("a whole number" if kind is int else "a number") from None
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number
    if kind is Path:
        return Path(text).expanduser()
    if kind is str:
        return text
    raise TypeError(f"settings cannot hold {kind}")


def _within(value: Any, metadata: Mapping[str, Any]) -> Any:
    low, high = metadata.get("minimum"), metadata.get("maximum")
    wanted = f"between {low} and {high}" if None not in (low, high) else f"at least {low}" if high is None else f"at most {high}"
    for item in value if isinstance(value, tuple) else (value,):
        if item is not None and ((low is not None and item < low) or (high is not None and item > high)):
            raise ValueError(wanted)
    return value
