"""The token of one attempt: derived, so whoever launches it again after a crash hands out the same one; none is stored (pure)."""

import hashlib
import hmac
import os
from dataclasses import dataclass, field

SALT_BYTES = 32


@dataclass(frozen=True)
class TokenMint:
    """Derives with a secret of the service; a token is as good as the secret and dies with its attempt's salt."""

    secret: bytes = field(repr=False)

    def salt(self) -> bytes:
        """Of a new attempt."""
        return os.urandom(SALT_BYTES)

    def token(self, job_uid: str, attempt: int, salt: bytes) -> str:
        """64 hex digits: HMAC-SHA-256 over job, attempt and salt."""
        return hmac.new(self.secret, f"attempt {job_uid} {attempt} ".encode() + salt, hashlib.sha256).hexdigest()

    def matches(self, token: str, job_uid: str, attempt: int, salt: bytes) -> bool:
        """Whether it is this attempt's, in constant time."""
        return len(salt) == SALT_BYTES and hmac.compare_digest(token.encode(), self.token(job_uid, attempt, salt).encode())
