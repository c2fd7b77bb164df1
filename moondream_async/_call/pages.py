"""Items one by one: from a list that the server gives in pages, or from any iterable."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from moondream_async._checks import check_count
from moondream_async._protocol.requests import Request
from moondream_async.errors import RequestError, ServerError

if TYPE_CHECKING:
    from .call import Caller

_MAX_LIMIT = 100  # the server's


async def entries(
    caller: Caller, path: str, key: str, *, limit: int, cursor: str | None
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the entries of a list of the server; each page is requested when it is needed.

    Args:
        caller: Makes the calls.
        path: The path of the list.
        key: The field of a page that holds its entries.
        limit: The entries of a page.
        cursor: Where to begin; None is the beginning of the list.

    Raises:
        RequestError: `limit` is not between 1 and 100.
    """
    used: set[str] = set()
    while True:
        page = await read_page(caller, path, limit=limit, cursor=cursor)
        found = page.get(key)
        for entry in found if isinstance(found, list) else ():
            if isinstance(entry, dict):
                yield entry
        cursor = page.get("next_cursor")
        if not isinstance(cursor, str) or not cursor or page.get("has_more") is False:
            return
        if cursor in used:
            raise ServerError("The server's pages go round in circles", status=200, body=page)
        used.add(cursor)


async def read_page(caller: Caller, path: str, *, limit: int, cursor: str | None) -> dict[str, Any]:
    """Return one page of a list of the server, as it came.

    Raises:
        RequestError: `limit` is not between 1 and 100.
    """
    check_count("limit", limit, most=_MAX_LIMIT)
    query = {"limit": limit} if cursor is None else {"limit": limit, "cursor": cursor}
    encoded = urlencode(query, errors="surrogatepass")
    request = Request(None, f"{path}?{encoded}", method="GET")
    return await caller.call(request).json()


async def each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    """Iterate over an iterable or asynchronous iterable; closing this closes its generator.

    Raises:
        RequestError: `items` is no iterable.
    """
    if isinstance(items, AsyncIterable):
        iterator = aiter(items)
        try:
            async for item in iterator:
                yield item
        finally:
            if isinstance(iterator, AsyncGenerator):
                await iterator.aclose()
    elif isinstance(items, Iterable):
        for item in items:
            yield item
    else:
        raise RequestError(f"requests must come from an iterable, not {items!r:.100}")
