"""The bodies of answers, read as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import aiohttp
from aiohttp import hdrs

from moondream_async._protocol import MAX_BODY_BYTES
from moondream_async.errors import APIConnectionError, ClientClosedError

from .faults import FAULTS, say
from .private import close_response, held
from .workers import Workers

if TYPE_CHECKING:
    from typing import Self

    from .pools import Pool

_T = TypeVar("_T")

READ_BUFFER_BYTES = 64 * 1024
"""aiohttp stops reading from the socket when twice as much waits for the reader."""

_PIECE_BYTES = 8 * 1024
"""The largest piece of a stream to decode at once: hundreds of events. Other tasks may run
between two pieces."""

_TURN = 0.005  # seconds of decoding, after which other tasks run

_LARGE_BYTES = 256 * 1024
"""A larger body is decoded in a thread, so as not to block the event loop."""

_decoding = Workers("decoding", 2)

_LINGER = 0.25  # seconds that a complete answer may wait for the end of its body
_ERROR_BODY_BYTES = 64 * 1024


class Body:
    """The body of one answer, as bytes that arrive; the source of a stream."""

    __slots__ = (
        "__weakref__",
        "_began",
        "_closed_by_client",
        "_finishing",
        "_on_close",
        "_pool",
        "_response",
        "_transport",
        "_unread",
        "closed",
        "headers",
        "received",
        "status",
    )

    def __init__(
        self, pool: Pool, response: aiohttp.ClientResponse, on_close: Callable[[int], None]
    ) -> None:
        self.status = response.status
        self.headers = response.headers
        self.closed = False
        """Whether its connection was given back to the pool or dropped."""
        self._pool = pool
        self._response = response
        connection = response.connection  # None if the whole body has arrived
        self._transport = None if connection is None else connection.transport
        self._on_close = on_close
        self.received = 0
        """The number of bytes that have arrived."""
        self._closed_by_client = False
        self._unread: bytes | memoryview = b""
        self._began = 0.0  # when the reader got the first of the bytes that are `_unread`
        self._finishing: asyncio.Lock | None = None
        pool.bodies.add(self)

    @property
    def content_type(self) -> str:
        """The content type, as ``text/event-stream``; "" if the answer has none."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return the bytes that have arrived; wait if there are none.

        Cancelling it loses no bytes. Bytes that arrived before an error are returned before the
        error is raised.
        """
        if self._unread:
            if monotonic() - self._began > _TURN:
                await asyncio.sleep(0)  # decoding takes long: other tasks first
                self._began = monotonic()
            data, self._unread = self._unread, b""
            if data and not self._closed_by_client:
                return self._cut(data)
        try:
            data = await self._response.content.readany()
        except FAULTS as error:
            return self._failed(error)
        if not data:
            self._settle()
            raise StopAsyncIteration
        self.received += len(data)
        if len(data) <= _PIECE_BYTES:
            return data
        self._began = monotonic()
        return self._cut(data)

    def _cut(self, data: bytes | memoryview) -> bytes:
        """Return the first piece of `data`, and keep the rest without copying it."""
        view = memoryview(data)
        self._unread = view[_PIECE_BYTES:] or b""  # an empty view would hold all of `data`
        return bytes(view[:_PIECE_BYTES])

    def _failed(self, error: BaseException) -> bytes:
        """Return the bytes that arrived before an error, or raise our error for it."""
        if not self.closed:
            data = held(self._response)
            if data:
                self.received += len(data)
                return data
        # All readers that a close wakes get the same exception object of aiohttp. Its traceback
        # would keep the frames, and so the connection, of each of them.
        error.__traceback__ = None
        by_client = self._closed_by_client
        self.close()
        if by_client:
            raise ClientClosedError("The client was closed during the call") from error
        where = self._response.url.origin()
        raise APIConnectionError(f"The connection to {where} was lost: {say(error)}") from error

    def unread(self, data: bytes) -> None:
        """Put bytes back; the next read returns them."""
        self._unread = data + self._unread
        self._began = monotonic()

    async def whole(self, decode: Callable[[bytes], _T], limit: int = MAX_BODY_BYTES) -> _T:
        """Read the whole body, and close it; return the result of `decode`.

        A large body is decoded in a thread.

        Raises:
            APIConnectionError: The connection was lost, or the body passed `limit` bytes.
        """
        content = self._response.content
        parts = [self._unread] if self._unread else []
        size, self._unread = len(self._unread), b""
        try:
            while size <= limit:
                try:
                    data = await content.readany()
                    self.received += len(data)
                    is_last = content.at_eof() and content.exception() is None
                except FAULTS as error:
                    data = self._failed(error)
                    is_last = False
                size += len(data)
                parts += (data,)
                if size <= limit and (is_last or not data):
                    self._settle()
                    if size <= _LARGE_BYTES:
                        return decode(b"".join(parts))
                    return await _decoding.submit(_decode_parts, decode, parts)
        finally:
            self.close()
        raise APIConnectionError(
            f"The reply of {self._response.url.origin()} is over the limit of {limit} bytes",
            permanent=True,
        )

    async def read_error(self, seconds: float) -> bytes:
        """Return the body of an error, as far as it arrives in time and within a limit."""
        data = b""
        timer = self._pool.loop.call_later(seconds, self.close)
        try:
            async for part in self:
                data += part
                if len(data) > _ERROR_BODY_BYTES:
                    break
        except APIConnectionError:
            pass  # the status alone is enough for an error
        finally:
            timer.cancel()
            self.close()
        return data[:_ERROR_BODY_BYTES]

    async def finish(self) -> None:
        """Wait a short time for the end of the body, so that its connection can be kept."""
        content = self._response.content
        if self._finishing is None:
            self._finishing = asyncio.Lock()
        async with self._finishing:  # only one task may call wait_eof()
            # And wait_eof() would wait for ever if the body has failed already.
            if not self.closed and not content.is_eof() and content.exception() is None:
                timer = self._pool.loop.call_later(_LINGER, self.close)
                try:
                    await content.wait_eof()
                except FAULTS:
                    pass  # the answer is complete; only the connection is lost
                finally:
                    timer.cancel()
            self.close()

    def close(self, *, by_client: bool = False) -> None:
        """Give the connection back, or drop it if the body is unfinished; from any thread."""
        if self.closed:
            return
        self._closed_by_client = by_client
        loop = self._pool.loop
        if _is_running_here(loop):
            self._close()
        elif loop.is_running():
            loop.call_soon_threadsafe(self._close)
        elif loop.is_closed():
            self._pool.abandon()
        else:
            self.abandon()

    def _close(self) -> None:
        if self.closed:
            return
        if self._response.connection is not None and self._transport is not None:
            # Not close(), which would first send the rest of an upload, and end TLS politely.
            self._transport.abort()
        self._response.close()
        self._settle()

    def abandon(self) -> None:
        """Close the connection at once, even if its loop is closed or does not run."""
        if not self.closed:
            self._closed_by_client = True
            close_response(self._response)
            self._settle()

    def disown(self) -> None:
        """Mark the body as closed, and touch nothing: it belongs to the parent process."""
        self.closed = self._closed_by_client = True

    def _settle(self) -> None:
        if not self.closed:
            self.closed = True
            self._pool.discard(self)
            self._on_close(self.received)


def _decode_parts(decode: Callable[[bytes], _T], parts: list[bytes]) -> _T:
    return decode(b"".join(parts))


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
