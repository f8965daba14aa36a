"""What every public service shares at the door: who calls, masks, times, and pages of a list."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.errors import ApiKeyInvalid, FieldInvalid
from services.chassis.identity import CALLER, Caller
from services.chassis.lists import PAGE, PAGE_BYTES, PageTokens

M = TypeVar("M", bound=Message)


def caller() -> Caller:
    """Whom the door let in."""
    found = CALLER.get()
    if found is None:
        raise ApiKeyInvalid
    return found


def paths(message: Message, mask: Any, mutable: Sequence[str], field: str = "update_mask") -> list[str]:
    """Which fields an update changes: those named, all mutable ones for `*`, the populated ones without a mask.

    Raises:
        FieldInvalid: an unknown or immutable path.
    """
    if not mask.paths:
        populated = {descriptor.name for descriptor, _ in message.ListFields()}
        return [name for name in mutable if name in populated]
    if list(mask.paths) == ["*"]:
        return list(mutable)
    for path in mask.paths:
        if path not in mutable:
            raise FieldInvalid(field, "path")
    return [name for name in mutable if name in mask.paths]


def timestamp(value: datetime | None) -> Timestamp | None:
    """As protobuf has it."""
    if value is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(value.astimezone(UTC))
    return stamp


@dataclass(frozen=True)
class Listing:
    """One page being asked for."""

    scope: tuple[str, ...]  # describes the list whole: method, parent, filter, order, and the caller's project
    after: list[str] | None
    size: int

    @property
    def limit(self) -> int:
        """One row more than the page holds says whether there is a next one."""
        return self.size + 1


class Paging:
    """The part of a desk that turns pages."""

    tokens: PageTokens

    def listing(self, page_size: int, page_token: str, *scope: str) -> Listing:
        """Read the paging fields.

        Raises:
            PageTokenInvalid: the token is of another list, another project, or altered.
        """
        whole = (*scope, caller().project_uid)
        return Listing(whole, self.tokens.open(page_token, *whole), page_size or PAGE)

    def page(
        self,
        listing: Listing,
        rows: Sequence[Mapping[Any, Any]],
        show: Callable[[Mapping[Any, Any]], M],
        after: Callable[[Mapping[Any, Any]], list[str]],
    ) -> tuple[list[M], str]:
        """The messages of this page and the token of the next; 3 MiB end a page, too."""
        shown: list[M] = []
        size = 0
        for row in rows[: listing.size]:
            message = show(row)
            size += message.ByteSize() + 8  # its tag and length
            if shown and size > PAGE_BYTES:
                break
            shown.append(message)
        more = len(shown) < len(rows)
        return shown, self.tokens.seal(*listing.scope, after=after(rows[len(shown) - 1])) if more else ""
