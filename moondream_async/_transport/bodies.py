"""Bodies of answers, read as they arrive."""

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
"""aiohttp stops reading from the socket at twice this much, until a reader has taken it."""

_PIECE_BYTES = 8 * 1024
"""Of a stream: hundreds of events. Between two of these others may have a turn."""

_TURN = 0.005  # seconds of decoding, after which others have their turn

_LARGE_BYTES = 256 * 1024
"""A whole body of more is decoded in a thread, and not while the event loop waits."""

_decoding = Workers("decoding", 2)

_LINGER = 0.25  # seconds that a complete answer may wait for the end of its body
_ERROR_BODY_BYTES = 64 * 1024


class Body:
    """The body of one answer, as bytes that arrive; what a stream reads from."""

    __slots__ = (
        "__weakref__",
        "_began",
        "_closed_by_client",
        "_finishing",
        "_is_cut",
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
        """Whether its connection is free again or dropped."""
        self._pool = pool
        self._response = response
        connection = response.connection  # None if the body is whole already
        self._transport = None if connection is None else connection.transport
        self._on_close = on_close
        self.received = 0
        """Bytes, so far."""
        self._closed_by_client = False
        self._unread = b""
        self._is_cut = False
        self._began = 0.0  # when what was cut began to be decoded, or went on
        self._finishing: asyncio.Lock | None = None
        pool.bodies.add(self)

    @property
    def content_type(self) -> str:
        """As ``text/event-stream``; "" where the server didn't say."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return what has arrived, and wait if that is nothing.

        Cancelling it loses nothing. What arrived before a fault comes before it.
        """
        if self._unread:
            if self._is_cut and monotonic() - self._began > _TURN:
                await asyncio.sleep(0)  # it takes long to decode: others first
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

    def _cut(self, data: bytes) -> bytes:
        """Return the first piece of it, and keep the rest."""
        self._unread = data[_PIECE_BYTES:]
        self._is_cut = bool(self._unread)
        return data[:_PIECE_BYTES]

    def _failed(self, error: BaseException) -> bytes:
        """Return what had arrived before a fault, or raise the error for it."""
        if not self.closed:
            data = held(self._response)
            if data:
                self.received += len(data)
                return data
        # All readers that are woken by a close get one and the same exception of
        # aiohttp's. It would keep a traceback, and so a connection, for each of them.
        error.__traceback__ = None
        by_client = self._closed_by_client
        self.close()
        if by_client:
            raise ClientClosedError("The client was closed during the call") from error
        raise APIConnectionError(f"The connection was lost: {say(error)}") from error

    def unread(self, data: bytes) -> None:
        """Put bytes back, to be read next."""
        self._unread = data + self._unread
        self._is_cut = False

    async def whole(self, decode: Callable[[bytes], _T], limit: int = MAX_BODY_BYTES) -> _T:
        """Read the whole body, and close it; return what `decode` makes of it.

        A large one is decoded in a thread.

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
            f"The server's reply is over the limit of {limit} bytes", permanent=True
        )

    async def read_error(self, seconds: float) -> bytes:
        """Return as much of an error's body as can be had, for so long, and is worth having."""
        data = b""
        timer = self._pool.loop.call_later(seconds, self.close)
        try:
            async for part in self:
                data += part
                if len(data) > _ERROR_BODY_BYTES:
                    break
        except APIConnectionError:
            pass  # the status says enough
        finally:
            timer.cancel()
            self.close()
        return data[:_ERROR_BODY_BYTES]

    async def finish(self) -> None:
        """Wait, shortly, for the end of the body, so that its connection can be kept."""
        content = self._response.content
        if self._finishing is None:
            self._finishing = asyncio.Lock()
        async with self._finishing:  # wait_eof() is for one at a time
            # And it would wait for ever on a body that has failed already.
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
        """Free the connection now; from any thread. One that is still in use is dropped."""
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
            # Not close(): that would first send what is left of an upload, and say goodbye
            # over TLS.
            self._transport.abort()
        self._response.close()
        self._settle()

    def abandon(self) -> None:
        """Close it at once; its loop may be closed, or at rest."""
        if not self.closed:
            self._closed_by_client = True
            close_response(self._response)
            self._settle()

    def disown(self) -> None:
        """Release the body without a trace: it belongs to the process this one was forked from."""
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
