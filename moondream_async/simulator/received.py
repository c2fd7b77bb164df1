"""The server's records of connections and requests, for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from .faults import Fault
from .validation import decode_image

if TYPE_CHECKING:
    from aiohttp import web

    from .script import ScriptedAnswer


class ReceivedRequest:
    """One request, and the state of its answer.

    Attributes:
        method: As ``POST``.
        path: As ``/v1/caption``.
        origin: The scheme, host and port that the request was sent to.
        params: The variable parts of the path, by name.
        query: The query string, decoded.
        headers: Found by name in any case.
        body: The decoded JSON, or None where there was none; the bytes of an upload.
        connection: The number of the TCP connection it came on, from 1; 0 where the
            application runs in a runner other than the simulator's own.
        fault: What went wrong on purpose, if anything.
        scripted: The answer that a script had for it, if any.
        held: Whether its answer is held now.
        status: The HTTP status of the answer, once it has begun.
        stream: Whether a stream of events was asked for.
        events_sent: How many writes were made for the stream.
        bytes_sent: How many bytes of the answer's body were handed to the socket.
        ended: Set when nothing more will be sent.
        ended_at: The time when `ended` was set, by `time.monotonic`.
        seconds: From its arrival until then.
        disconnected: Whether the client went away before the answer was whole.
    """

    def __init__(
        self, request: web.Request, connection: int, limiter: anyio.CapacityLimiter
    ) -> None:
        self.method = request.method
        self.path = request.path
        self.origin = f"{request.scheme}://{request.host}"  # of the header Host, unchecked
        self.params: Mapping[str, str] = request.match_info
        self.query: Mapping[str, str] = request.query
        self.headers: Mapping[str, str] = request.headers
        self.body: Any = None
        self.connection = connection
        self.fault: Fault | None = None
        self.scripted: ScriptedAnswer | None = None
        self.held = False
        self.status: int | None = None
        self.stream = False
        self.events_sent = 0
        self.bytes_sent = 0
        self.ended = asyncio.Event()
        self.ended_at: float | None = None
        self.seconds = 0.0
        self.disconnected = False
        self._limiter = limiter
        self._began = time.monotonic()

    def __repr__(self) -> str:
        state = "disconnected" if self.disconnected else "ended" if self.ended.is_set() else "open"
        state = "held" if self.held else state
        return f"<{self.method} {self.path}: {self.status}, {state}>"

    def end(self) -> None:
        """Mark that nothing more will be sent."""
        self.ended_at = time.monotonic()
        self.seconds = self.ended_at - self._began
        self.ended.set()

    async def find(self, look: Callable[..., Any], *args: Any) -> Any:
        """Return the scripted answer, or what a function finds that looks at pictures.

        The function is called in one of a few threads that nothing else takes.
        """
        if self.scripted is not None and self.scripted.answer is not None:
            return self.scripted.answer
        return await anyio.to_thread.run_sync(look, *args, limiter=self._limiter)

    @property
    def images(self) -> list[bytes]:
        """The pictures of the body, in order, each as the bytes of its file.

        Raises:
            RefusedError: One is not a picture in base64; the request was refused for it.
        """
        return [decode_image(url) for url in _find_images(self.body)]


def _find_images(part: Any) -> Iterator[str]:
    """Yield the pictures of a skill's body, or of a chat's, as they are sent."""
    match part:
        case {"image_url": str(url) | {"url": str(url)}}:
            yield url
        case {"messages": [*parts]} | {"content": [*parts]}:
            for each in parts:
                yield from _find_images(each)


class Connections:
    """The TCP connections of a server.

    Attributes:
        accepted: How many there were in all.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.accepted = 0
        self._open: dict[object, int] = {}
        self._on_change = on_change

    @property
    def open(self) -> int:
        """How many are open now."""
        return len(self._open)

    def number(self, protocol: object) -> int:
        """Return the number of an open connection, from 1, or 0 for an unknown one."""
        return self._open.get(protocol, 0)

    def watch(self, server: web.Server) -> None:
        """Count the connections that `server` accepts and loses."""
        accept, lose = server.connection_made, server.connection_lost

        def connection_made(handler: web.RequestHandler, transport: asyncio.Transport) -> None:
            self.accepted += 1
            self._open[handler] = self.accepted
            self._on_change()
            accept(handler, transport)

        def connection_lost(handler: web.RequestHandler, exc: BaseException | None = None) -> None:
            lose(handler, exc)
            self._open.pop(handler, None)
            self._on_change()

        # aiohttp has no signal for either, and a runner makes its server by itself.
        server.connection_made = connection_made  # type: ignore[method-assign]
        server.connection_lost = connection_lost  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"<connections: {self.accepted} accepted, {self.open} open>"
