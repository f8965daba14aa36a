"""Granted rows as examples. What breaks a rule ends the run and names the line."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.chassis.objects import SyncObjects
from services.finetune.rows import Row, Turn
from services.finetune.trainer.batches import Example
from services.finetune.trainer.control import Claim, Failure, Warned
from services.finetune.trainer.grants import Unusable, divided, near_overlap, numbered
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Method, Spec
from services.pretrained.templates import TemplateRefused

__all__ = ["Prepared", "Unusable", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples to learn from and to measure on, and the labels by index."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    labels: tuple[str, ...]
    warnings: tuple[Warned, ...]
    learnt: tuple[tuple[int, Row], ...] = ()  # the rows to learn from, with their numbers in the version


def prepare(objects: SyncObjects, claim: Claim, renderer: Renderer) -> Prepared:
    """Read, split, render. Raises Unusable, and ObjectsUnavailable where the store cannot be reached."""
    spec = claim.spec
    rows, held = divided(objects, claim)
    learnt = tuple(numbered(rows, held, claim.validation is not None)) if spec.privacy is None else ()
    labels = tuple(sorted({row.label for row in rows})) if spec.method is Method.CLASSIFY else ()
    warnings: list[Warned] = []
    # Of a private run's rows nothing is told that its accountant does not count.
    if spec.privacy is None and held and (near := near_overlap(rows, held)) is not None:
        warnings.append(near)
    unknown = [row for row in held if labels and row.label not in labels]
    if unknown:
        warnings.append(Warned("V7.label_not_in_train", unknown[0].line, len(unknown)))
        held = [row for row in held if row.label in labels]
    train = _examples(rows, spec, labels, renderer, warnings)
    validation = _examples(held, spec, labels, renderer, warnings)
    if not train:
        raise Unusable(Failure("DATA_INVALID", "V9.none_left"))
    return Prepared(tuple(train), tuple(validation), labels, tuple(warnings), learnt)


def _examples(rows: list[Row], spec: Spec, labels: tuple[str, ...], renderer: Renderer, warnings: list[Warned]) -> list[Example]:
    index = {label: at for at, label in enumerate(labels)}
    found: list[Example] = []
    long: list[int] = []
    for row in rows:
        for example in _rendered(row, index, renderer):
            if example.longest > spec.seq_len:
                long.append(row.line)
            else:
                found.append(example)
    if long:
        warnings.append(Warned("V9.too_long", long[0], len(long)))
    return found


def _rendered(row: Row, index: dict[str, int], renderer: Renderer) -> Iterator[Example]:
    if index:
        yield renderer.labelled(row.text, index[row.label])
        return
    try:
        if row.prompt:
            better, worse = (renderer.chat((Turn("user", row.prompt), Turn("assistant", said))) for said in (row.chosen, row.rejected))
            yield replace(better[-1], against=worse[-1])
        else:
            yield from renderer.chat(row.messages)
    except TemplateRefused:
        raise Unusable(Failure("DATA_INVALID", "V6.template", row.line, "messages")) from None
