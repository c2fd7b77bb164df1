"""Single requests to any host, with a check of the address that is connected to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from moondream_async._protocol import USER_AGENT
from moondream_async.errors import APIConnectionError, ImageError

from .addresses import Address, shown
from .pools import Pool
from .sockets import Guard

if TYPE_CHECKING:
    import ssl

    from .bodies import Body


@contextlib.asynccontextmanager
async def fetch(
    url: str, *, allows: Callable[[Address], bool], ssl_context: ssl.SSLContext | None
) -> AsyncGenerator[Body, None]:
    """GET an address once, over a connection of its own, without key, cookies and proxy.

    Raises:
        ImageError: `allows` refuses the IP address of the host.
        APIConnectionError: The connection could not be made, or was lost.
    """

    def refusal(_url: URL, _address: str) -> ImageError:
        return ImageError(f"{shown(url)} is not on the public internet")

    pool = Pool(
        asyncio.get_running_loop(),
        session=None,
        ssl_context=ssl_context,
        guard=lambda _: Guard(allows, refusal),
    )
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        yield await pool.request(
            "GET",
            URL(url),
            headers=headers,
            on_send=lambda _: None,
            on_close=lambda _: None,
            max_redirects=0,
        )
    except APIConnectionError as error:
        if isinstance(error.__cause__, aiohttp.InvalidURL):
            raise ImageError(f"{shown(url)} is no valid address") from error
        raise
    finally:
        await pool.aclose()
