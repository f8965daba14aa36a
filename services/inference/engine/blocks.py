"""The pool of KV blocks, counted by reference, and the prefix cache over the full ones. Pure: ids and keys, no memory.

A block is free (no content worth keeping), held (by one or more sequences) or idle (held by none, but its content has a key and may be
found again). Keys chain: a block's key covers every token up to its end, and the root is keyed with a tenant's secret, so that no tenant
can find, or time, what another one computed.
"""

import hashlib
import hmac
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.inference.engine.step import BLOCK_SIZE

KEY_BYTES = 16


def root_key(cache_salt: bytes, tenant: str, model: str, adapter: str = "") -> bytes:
    """Key before the first block. `model` and `adapter` are digests."""
    return hmac.digest(cache_salt, f"{tenant}\0{model}\0{adapter}".encode(), "sha256")[:KEY_BYTES]


def child_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of the full block that holds `tokens` after `parent`."""
    return hashlib.blake2b(array("q", tokens).tobytes(), digest_size=KEY_BYTES, key=parent).digest()


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` positions."""
    return -(-tokens // BLOCK_SIZE)


class Blocks:
    """`count` blocks, of which one tenant's idle ones never exceed `tenant_quota`."""

    def __init__(self, count: int, tenant_quota: int) -> None:
        self.count = count
        self.releases = 0  # so far
        self._quota = tenant_quota
        self._references = [0] * count
        self._keys: list[bytes | None] = [None] * count
        self._tenants = [""] * count
        self._adapters = [""] * count  # which computed it; empty: the base alone
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._idle_of: dict[str, OrderedDict[int, None]] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can still give."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that some sequence refers to."""
        return self.count - self.available

    def idle_of(self, tenant: str) -> int:
        """Idle blocks that a tenant's prefixes keep."""
        return len(self._idle_of.get(tenant, ()))

    def take(self) -> int | None:
        """A block of one's own, its content undefined; None when every block is held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block = next(iter(self._idle))
            self._wake(block)
            self._forget(block)
        else:
            return None
        self._references[block] = 1
        return block

    def take_many(self, count: int) -> list[int]:
        """`count` blocks, which must be available."""
        taken = [block for block in (self.take() for _ in range(count)) if block is not None]
        assert len(taken) == count  # the caller asked `available`
        return taken

    def hold(self, keys: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix of `keys`, each with one more reference."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            if not self._references[block]:
                self._wake(block)
            self._references[block] += 1
            found.append(block)
        return found

    def publish(self, block: int, key: bytes, tenant: str, adapter: str = "") -> None:
        """Let a held, full block be found by `key`. When two computed the same, the first stays known."""
        if self._keys[block] is None and key not in self._by_key:
            self._keys[block] = key
            self._tenants[block], self._adapters[block] = tenant, adapter
            self._by_key[key] = block

    def release(self, blocks: Sequence[int], suspect: bool = False) -> None:
        """Give back one reference each. `suspect` content is never found again."""
        self.releases += 1
        # Last block first: a prefix is of use without its end, an end is of none without its prefix.
        for block in reversed(blocks):
            if suspect:
                self._forget(block)
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
                continue
            tenant = self._tenants[block]
            mine = self._idle_of.setdefault(tenant, OrderedDict())
            self._idle[block] = mine[block] = None
            if len(mine) > self._quota:
                oldest = next(iter(mine))
                self._wake(oldest)
                self._forget(oldest)
                self._free.append(oldest)

    def erase(self, adapter: str) -> None:
        """Never find again what this adapter computed; idle blocks of it are free."""
        for block, key in enumerate(self._keys):
            if key is not None and self._adapters[block] == adapter:
                if not self._references[block]:
                    self._wake(block)
                    self._free.append(block)
                self._forget(block)

    def _wake(self, block: int) -> None:
        del self._idle[block]
        mine = self._idle_of[self._tenants[block]]
        del mine[block]
        if not mine:
            del self._idle_of[self._tenants[block]]

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
