"""What an attempt shows to prove who it is, whoever launched it; and the token of a local one, derived, so that none is stored (pure).

A derived token is the same for whoever launches its attempt again after a crash. In a cluster the token is the pod's own, and the cluster
says whose it is (`token_reviews.py`).
"""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from typing import Protocol

SALT_BYTES = 32


class Shown(Protocol):
    """A token that was shown, and looked at before any row was locked."""

    @property
    def replaces(self) -> bool:
        """Whether a new process of the attempt may take the run over: it is certain that the one before it has ended."""
        ...

    def of(self, job_uid: str, attempt: int, salt: bytes) -> bool:
        """Whether it is this attempt's."""
        ...


class Tokens(Protocol):
    """Where attempts run decides what they show."""

    async def shown(self, token: str, *, anew: bool) -> Shown:
        """Look at a token. `anew`: nothing that is remembered of it counts. Raises StoreUnavailable if that cannot be said now."""
        ...


@dataclass(frozen=True)
class Minted:
    """A token that was derived, or not."""

    mint: "TokenMint"
    token: str = field(repr=False)
    replaces: bool = False

    def of(self, job_uid: str, attempt: int, salt: bytes) -> bool:
        """See Shown."""
        return self.mint.matches(self.token, job_uid, attempt, salt)


@dataclass(frozen=True)
class TokenMint:
    """Tokens of local attempts. Derives with a secret of the service; a token is as good as the secret and dies with its attempt's salt."""

    secret: bytes = field(repr=False)

    async def shown(self, token: str, *, anew: bool) -> Minted:
        """See Tokens."""
        return Minted(self, token)

    def salt(self) -> bytes:
        """Of a new attempt."""
        return os.urandom(SALT_BYTES)

    def token(self, job_uid: str, attempt: int, salt: bytes) -> str:
        """64 hex digits: HMAC-SHA-256 over job, attempt and salt."""
        return hmac.new(self.secret, f"attempt {job_uid} {attempt} ".encode() + salt, hashlib.sha256).hexdigest()

    def matches(self, token: str, job_uid: str, attempt: int, salt: bytes) -> bool:
        """Whether it is this attempt's, in constant time."""
        return len(salt) == SALT_BYTES and hmac.compare_digest(token.encode(), self.token(job_uid, attempt, salt).encode())
