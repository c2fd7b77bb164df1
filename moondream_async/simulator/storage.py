"""Files to download, pages of lists, and ids, for batches and tuning."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from .received import ReceivedRequest
from .steps import Body, Reply, Route
from .validation import RefusedError, read_typed


class Storage:
    """Holds files that are fetched by presigned URL, as from the cloud's object store.

    Such a URL carries its own permission. Like the real store, this one refuses a
    request that brings a key as well: a client must not send its key there.
    """

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def routes(self) -> list[Route]:
        """Return the one endpoint; it lies outside the API's own paths."""
        return [Route("GET", "/storage/{name}", self._download, "none")]

    def put(self, origin: str, name: str, data: bytes) -> str:
        """Keep a file under a name; return its presigned URL."""
        self._files[name] = data
        return f"{origin}/storage/{name}?X-Signature={_sign(name)}"

    async def _download(self, received: ReceivedRequest) -> Reply:
        name = received.params["name"]
        if "Authorization" in received.headers or "X-Moondream-Auth" in received.headers:
            return _refuse(400, "InvalidArgument", "Only one auth mechanism allowed")
        if received.query.get("X-Signature") != _sign(name) or name not in self._files:
            return _refuse(403, "AccessDenied", "Request has expired or is not signed")
        return Reply(body=self._files[name], content_type="application/octet-stream")


class _PageQuery(msgspec.Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=100)]
    cursor: str = ""


def take_page(key: str, items: list[Body], query: Mapping[str, str], *, default: int = 50) -> Body:
    """Return the page of a list that a query asks for by `limit` and `cursor`, under `key`.

    Raises:
        RefusedError: The limit is out of range, or the cursor did not come from a page.
    """
    page = read_typed({"limit": default, **query}, _PageQuery, strict=False)
    try:
        start = int(base64.urlsafe_b64decode(page.cursor or "MA=="))
    except ValueError:
        raise RefusedError("Invalid cursor", param="cursor") from None
    stop = start + page.limit
    more = stop < len(items)
    cursor = base64.urlsafe_b64encode(str(stop).encode()).decode() if more else None
    return {key: items[start:stop], "next_cursor": cursor, "has_more": more}


def make_id(number: int) -> str:
    """Return an id that looks like the cloud's own: 26 characters that begin with 01.

    >>> make_id(7)
    '01SIM000000000000000000007'
    """
    return f"01SIM{number:021d}"


def _refuse(status: int, code: str, message: str) -> Reply:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, error, content_type="application/xml")


def _sign(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
