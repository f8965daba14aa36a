"""Whose a pod's token is, by the cluster's word: a projected service-account token whose audience names the attempt, shown to TokenReview.

What was said of a token is remembered until it expires, so that a training goes on reporting while the API server is away; only a claim
of the run is asked about anew. An attempt that is over shows a good token in vain: the job's row has another one.
"""

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from services.chassis.cluster import Api, Refused
from services.chassis.errors import StoreUnavailable
from services.chassis.listwatch import Expired, Unreachable
from services.finetune.jobs import attempt_name
from services.finetune.launchers.job_manifest import audience, whose

__all__ = ["NOBODY", "Reviewed", "TokenReviews"]

log = logging.getLogger(__name__)

PATH = "/apis/authentication.k8s.io/v1/tokenreviews"
KEPT = 4_096  # tokens remembered
LONGEST_S = 7_200.0  # a token is never remembered for longer, whatever it says of itself
TOKEN_BYTES = 6_000


@dataclass(frozen=True, slots=True)
class Reviewed:
    """Whose a token is; attempt 0: nobody's."""

    job_uid: str
    attempt: int
    expires: float = 0.0  # seconds of the epoch
    replaces: bool = True  # podReplacementPolicy Failed: a pod starts when the one before it has ended

    def of(self, job_uid: str, attempt: int, salt: bytes) -> bool:
        """See tokens.Shown."""
        return self.attempt > 0 and (self.job_uid, self.attempt) == (job_uid, attempt)


NOBODY = Reviewed("", 0)


@dataclass(eq=False)
class TokenReviews:
    """tokens.Tokens of a cluster's attempts."""

    api: Api
    namespaces: Iterable[str]  # a pod elsewhere may ask for a token of any audience
    clock: Callable[[], float] = time.time
    _known: "OrderedDict[bytes, Reviewed]" = field(default_factory=OrderedDict)

    async def shown(self, token: str, *, anew: bool) -> Reviewed:
        """See tokens.Tokens."""
        if len(token) > TOKEN_BYTES or (named := claimed(token)) is None:
            return NOBODY
        key = hashlib.sha256(token.encode()).digest()
        known = self._known.get(key)
        if known is not None and not anew and self.clock() < known.expires:
            return known
        try:
            found = await asyncio.to_thread(self._ask, token, *named)
        except (Unreachable, Expired, Refused) as error:
            log.warning("a token cannot be reviewed: %s", error)
            raise StoreUnavailable from error
        if found is not NOBODY:
            self._known[key] = found
            self._known.move_to_end(key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return found

    def _ask(self, token: str, job_uid: str, attempt: int, expires: float) -> Reviewed:
        wanted = audience(job_uid, attempt)
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": [wanted]}}
        status = self.api.ask("POST", PATH, body).get("status") or {}
        user = status.get("user") or {}
        good = (
            status.get("authenticated") is True
            and wanted in (status.get("audiences") or ())
            and any(str(user.get("username")).startswith(f"system:serviceaccount:{each}:") for each in self.namespaces)
            and _pod(user).startswith(f"{attempt_name(job_uid, attempt)}-")
        )
        return Reviewed(job_uid, attempt, min(expires, self.clock() + LONGEST_S)) if good else NOBODY


def claimed(token: str) -> tuple[str, int, float] | None:
    """Job, attempt and end that a token says of itself, unproven; None: it is no attempt's."""
    try:
        part = token.split(".")[1]
        said = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        named = [found for each in said["aud"] if (found := whose(each)) is not None]
        return (*named[0], float(said["exp"])) if len(named) == 1 else None
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _pod(user: dict[str, Any]) -> str:
    """The pod that a token is bound to."""
    names = (user.get("extra") or {}).get("authentication.kubernetes.io/pod-name") or [""]
    return str(names[0])
