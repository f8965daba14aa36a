"""Granted bytes as rows: digest first. What breaks a rule ends the run and names the line."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from services.chassis.objects import ObjectMissing, SyncObjects
from services.finetune import near_duplicates
from services.finetune.rows import Row, read_rows
from services.finetune.splits import split
from services.finetune.trainer.control import Claim, Failure, Grant, Warned
from services.pretrained import weights

__all__ = ["Unusable", "divided", "granted", "near_overlap", "numbered", "same_base"]


class Unusable(Exception):
    """The run can never succeed; `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def same_base(directory: Path, claim: Claim) -> str:
    """The digest of the base's weights in `directory`. Raises Unusable where the job was planned for others."""
    with tempfile.TemporaryDirectory() as folder:
        digest = weights.digest(directory, Path(folder))
    if claim.base_digest and digest != claim.base_digest:
        raise Unusable(Failure("BASE_CHANGED"))
    return digest


def divided(objects: SyncObjects, claim: Claim) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to measure on. Raises Unusable, and ObjectsUnavailable where the store cannot be reached."""
    spec = claim.spec
    rows = granted(objects, claim.train)
    held = granted(objects, claim.validation) if claim.validation is not None else []
    # A private run measures on no row that it promises to protect.
    if claim.validation is None and spec.validation_fraction > 0 and spec.privacy is None:
        learnt, measured = split([row.digest for row in rows], [row.label for row in rows], spec.validation_fraction, spec.seed)
        rows, held = [rows[at] for at in learnt], [rows[at] for at in measured]
    return rows, held


def numbered(learnt: Sequence[Row], held: Sequence[Row], apart: bool) -> list[tuple[int, Row]]:
    """The learnt rows with their numbers in their file, from 0; `apart`: the held ones are of another file."""
    places = sorted(row.byte_offset for row in (learnt if apart else [*learnt, *held]))
    number = {offset: at for at, offset in enumerate(places)}
    return [(number[row.byte_offset], row) for row in learnt]


def near_overlap(learnt: Sequence[Row], held: Sequence[Row]) -> Warned | None:
    """Rows to measure on that are nearly alike one to learn from (V12): what is measured on them is too good. None: there are none.

    Exact ones cannot be there: two versions that share rows make no job, and a split keeps equal rows on one side.
    """
    most = near_duplicates.MAX_TEXTS
    ours, theirs = (near_duplicates.minima(["\n".join(row.said) for row in rows[:most]]) for rows in (learnt, held))
    found = near_duplicates.overlap(ours, theirs)
    return Warned("V12.near_rows", held[int(found[0])].line, len(found)) if len(found) else None


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
