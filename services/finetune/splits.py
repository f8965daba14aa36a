"""Which rows are kept back to measure on: a share of each label, by seed and by what a row says, wherever it stands (pure)."""

import hashlib
from collections.abc import Hashable, Sequence

__all__ = ["split"]


def split(digests: Sequence[bytes], groups: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to learn from and to measure on, each ascending.

    Args:
        digests: of each row, by which equal rows stay on the same side.
        groups: of each row, its label; of each, `share` is kept back, rounded, but never all.
        share: 0..1 of the rows to measure on.
        seed: another one draws other rows.
    """
    drawn = {digest: hashlib.sha256(b"%d:" % seed + digest).digest() for digest in set(digests)}
    kept: set[bytes] = set()
    members: dict[Hashable, dict[bytes, int]] = {}
    for digest, group in zip(digests, groups, strict=True):
        counts = members.setdefault(group, {})
        counts[digest] = counts.get(digest, 0) + 1
    for counts in members.values():
        total = sum(counts.values())
        # What another label of the same text has put aside counts here, too.
        wanted = min(round(total * share), total - 1) - sum(count for digest, count in counts.items() if digest in kept)
        for digest in sorted(counts.keys() - kept, key=lambda each: drawn[each]):
            if counts[digest] <= wanted:
                kept.add(digest)
                wanted -= counts[digest]
    train = [at for at, digest in enumerate(digests) if digest not in kept]
    return train, [at for at, digest in enumerate(digests) if digest in kept]
