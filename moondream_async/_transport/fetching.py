"""Single requests to anywhere, but not to everything that a name may resolve to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import aiohttp
import aiohttp.abc
import aiohttp.resolver
from yarl import URL

from moondream_async._protocol import USER_AGENT
from moondream_async.errors import APIConnectionError, ImageError

from .bodies import Body
from .pools import Pool

if TYPE_CHECKING:
    import ssl


class _GuardedResolver(aiohttp.abc.AbstractResolver):
    """Resolves names, and lets through only the addresses that may be reached."""

    def __init__(self, may_reach: Callable[[str], bool]) -> None:
        self._resolver = aiohttp.resolver.DefaultResolver()
        self._may_reach = may_reach

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        allowed = [each for each in found if self._may_reach(each["host"])]
        if not allowed:
            raise _RefusedAddressError(f"{host} is not on the public internet")
        return allowed

    async def close(self) -> None:
        await self._resolver.close()


class _RefusedAddressError(OSError):
    """A name resolves to nothing that may be reached."""


@contextlib.asynccontextmanager
async def fetch(
    url: str, *, may_reach: Callable[[str], bool], ssl_context: ssl.SSLContext | None
) -> AsyncGenerator[Body, None]:
    """GET an address, once, over a connection of its own, without a key or a cookie.

    Names are resolved to addresses for which `may_reach` holds, or refused. An
    address that stands in the URL itself is for the caller to check.

    Raises:
        ImageError: The name resolves to an address that may not be reached.
        APIConnectionError: The connection could not be made, or was lost.
    """
    resolver = _GuardedResolver(may_reach)
    pool = Pool(
        asyncio.get_running_loop(),
        session=None,
        ssl_context=ssl_context,
        proxy=None,
        resolver=resolver,
    )
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        response = await pool.send("GET", URL(url), headers, (), lambda: None)
        yield Body(pool, response, lambda _: None)
    except APIConnectionError as error:
        cause = error.__cause__
        refusal = (
            cause if isinstance(cause, aiohttp.InvalidURL) else getattr(cause, "os_error", None)
        )
        if isinstance(refusal, (_RefusedAddressError, aiohttp.InvalidURL)):
            raise ImageError(str(refusal)) from error
        raise
    finally:
        await pool.aclose()
        await resolver.close()
