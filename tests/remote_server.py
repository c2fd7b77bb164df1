"""A raw server in a thread and an event loop of its own, for tests that have loops of theirs."""

from contextlib import contextmanager

import anyio
from aiohttp import web
from aiohttp.test_utils import TestServer
from anyio.from_thread import start_blocking_portal
from raw_server import EVENTS, STREAM_HEAD, RawServer, in_chunks


async def answer_then_stall(peer):
    """Answer plain calls, and leave streams after a word."""
    while True:
        request = await peer.request()
        if request.wants_stream:
            await peer.send(STREAM_HEAD + in_chunks(EVENTS[0], end=False))
            await peer.until_gone()
        peer.requests.pop()
        await peer.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n"
            + b'{"caption": "A cat sleeps."}'.ljust(40)
        )


class Remote:
    """A server in another thread."""

    def __init__(self, portal, server):
        self.endpoint = server.endpoint
        self.server = server
        self._portal = portal

    def wait_until_idle(self):
        async def wait():
            with anyio.fail_after(30):
                await self.server.until_idle()

        self._portal.call(wait)

    @property
    def open(self):
        return self._portal.call(lambda: self.server.open)


@contextmanager
def serving(play, **options):
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(RawServer(play, **options)) as server,
    ):
        yield Remote(portal, server)


@contextmanager
def serving_pages(*routes):
    """Serve aiohttp's routes in another thread; gives the address without a path."""

    async def make():
        app = web.Application()
        app.add_routes(routes)
        return TestServer(app)

    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(portal.call(make)) as server,
    ):
        yield str(server.make_url("")).rstrip("/")
