"""Granted bytes as examples: digest first, then rows, then ids. What breaks a rule ends the run and names the line."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from services.chassis.objects import ObjectMissing, SyncObjects
from services.finetune.rows import Row, Turn, read_rows
from services.finetune.splits import split
from services.finetune.trainer.batches import Example
from services.finetune.trainer.control import Claim, Failure, Grant, Warned
from services.finetune.trainer.rendering import Renderer
from services.finetune.trainer.spec import Method, Spec
from services.pretrained.templates import TemplateRefused

__all__ = ["Prepared", "Unusable", "prepare"]


class Unusable(Exception):
    """The run can never succeed; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples to learn from and to measure on, and the labels by index."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    labels: tuple[str, ...]
    warnings: tuple[Warned, ...]


def prepare(objects: SyncObjects, claim: Claim, renderer: Renderer) -> Prepared:
    """Read, split, render. Raises Unusable, and ObjectsUnavailable where the store cannot be reached."""
    spec = claim.spec
    rows = granted(objects, claim.train)
    held = granted(objects, claim.validation) if claim.validation is not None else []
    # A private run measures on no row that it promises to protect.
    if claim.validation is None and spec.validation_fraction > 0 and spec.privacy is None:
        learnt, measured = split([row.digest for row in rows], [row.label for row in rows], spec.validation_fraction, spec.seed)
        rows, held = [rows[at] for at in learnt], [rows[at] for at in measured]
    labels = tuple(sorted({row.label for row in rows})) if spec.method is Method.CLASSIFY else ()
    warnings: list[Warned] = []
    unknown = [row for row in held if labels and row.label not in labels]
    if unknown:
        warnings.append(Warned("V7.label_not_in_train", unknown[0].line, len(unknown)))
        held = [row for row in held if row.label in labels]
    train = _examples(rows, spec, labels, renderer, warnings)
    validation = _examples(held, spec, labels, renderer, warnings)
    if not train:
        raise Unusable(Failure("DATA_INVALID", "V9.none_left"))
    return Prepared(tuple(train), tuple(validation), labels, tuple(warnings))


def granted(objects: SyncObjects, grant: Grant) -> list[Row]:
    """The rows of a grant, once its bytes have proved to be those granted. Raises Unusable."""
    found = hashlib.sha256()
    try:
        data = b"".join(objects.stream(grant.path))
    except ObjectMissing:
        raise Unusable(Failure("DATA_INVALID", "V1.missing")) from None
    found.update(data)
    if found.hexdigest() != grant.sha256:
        raise Unusable(Failure("DATA_INVALID", "V1.digest"))
    rows = []
    for row in read_rows([data], grant.layout):
        if isinstance(row, Row):
            rows.append(row)
        elif row.severity == "error":
            raise Unusable(Failure("DATA_INVALID", row.rule, row.line, row.field))
    return rows


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
