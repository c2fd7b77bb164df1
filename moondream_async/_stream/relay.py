"""A stream in bytes, for a web server to relay to a browser or a proxy.

Web frameworks end an iterator in different ways when the browser has gone. Some close it. Some
cancel the task that reads, which may be waiting for the next piece or writing to a slow browser;
an exception may then keep the frames of the task, and with them the stream, until the garbage
collector comes. Closing and cancelling close the stream at once (`owner`). Dropping closes it,
too, and without a warning, since the program could have done nothing better.

In an `EventStream`, each block of events that has arrived becomes one piece of bytes, so that a
fast answer takes few writes. If no block has arrived, the stream waits for one, and gives a
heartbeat if the wait is long.

During the wait, and only then, there is a task, since the wait must go on while the web server
sends a heartbeat: another attempt at the request may be in progress, which must not begin anew.
So the limits of `Timeout` run on under heartbeats, too. The task ends with one block, and the next
begins when that block has been taken: no more than one block is read ahead of a slow browser.
Without heartbeats there is no task.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, Self

import msgspec

from moondream_async._checks import check_positive
from moondream_async._protocol.chunks import Block
from moondream_async.errors import MoondreamError
from moondream_async.results import BboxEvent, ReasoningEvent, StreamEvent

from .owner import Owner, end_loop

if TYPE_CHECKING:
    from asyncio import Task

HEARTBEAT = b":\n\n"
"""A comment: readers of events ignore it, and proxies see that the connection is in use."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else nginx, and other proxies, hold back short pieces
}

_FACTS = (
    "request_id",
    "finish_reason",
    "metrics",
    "usage",
    "reasoning",
    # an outline's
    "bbox",
    "path",
    "parse_error",
)
_FAULT_FIELDS = ("status", "phase")


class Answer(Protocol):
    """The part of a stream that is used here."""

    @property
    def completed(self) -> bool:
        """Whether the whole answer has arrived."""

    async def aclose(self) -> None:
        """Give its connection back, or drop it if the answer is unfinished."""

    _owner: Owner | None

    def _belong_to_reader(self) -> None: ...

    async def _pull(self) -> None: ...

    def _rest(self) -> Block: ...

    def _close(self) -> None: ...

    def _close_for_cancelled(self) -> None: ...


class Relay(AsyncIterator[bytes]):
    """A stream in bytes, with headers for the response that carries it.

    The stream ends when this is read to the end, closed or dropped, and when the task that reads
    it is cancelled.
    """

    __slots__ = ("__weakref__", "_stream")

    content_type: ClassVar[str]

    def __init__(self, stream: Answer) -> None:
        self._stream = stream

    @property
    def headers(self) -> dict[str, str]:
        """Headers for the response: the content type, and to cache and hold back nothing."""
        return {"Content-Type": self.content_type, **_HEADERS}

    def __aiter__(self) -> Self:
        return self

    async def aclose(self) -> None:
        """Close the stream; from any task, at any time, and more than once.

        The connection of an unfinished answer is dropped at once, so that the server stops
        working.
        """
        await self._stream.aclose()

    def close(self) -> None:
        """Close the stream without waiting, from any thread; Django calls it after a request."""
        self._stream._close()  # noqa: SLF001 - a part of the stream

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} can't be copied: it is one connection, read once")

    def __del__(self) -> None:
        try:
            end_loop(self._stream)
            self.close()
        except (AttributeError, ImportError):
            return  # `__init__` failed, or the interpreter ends


class ByteStream(Relay):
    """A stream's text in UTF-8: see `Stream.chunk_bytes`."""

    __slots__ = ()
    content_type = "text/plain; charset=utf-8"

    async def __anext__(self) -> bytes:
        """Return the next pieces of text. Cancelling it closes the stream.

        Raises:
            MoondreamError: As reading the stream itself raises.
        """
        stream = self._stream
        stream._belong_to_reader()  # noqa: SLF001 - a part of the stream
        while True:
            text = "".join(stream._rest().texts)  # noqa: SLF001 - likewise
            if text:
                return text.encode(errors="replace")
            await stream._pull()  # noqa: SLF001 - likewise


class EventStream(Relay):
    """A stream as Server-Sent Events, whole events and comments: see `Stream.sse`.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         stream = await client.caption(md.SAMPLE_IMAGE, "short", stream=True)
    ...         events = stream.sse()
    ...         async for piece in events:
    ...             break
    ...         await events.aclose()  # as web frameworks do; some call `close`
    ...         return events.headers["Cache-Control"]
    >>> asyncio.run(main())
    'no-cache'
    """

    __slots__ = ("_busy", "_heartbeat", "_opening", "_over", "_reading")
    content_type = "text/event-stream"
    headers = Relay.headers  # so that a reference shows it here

    def __init__(self, stream: Answer, heartbeat: float | None) -> None:
        if heartbeat is not None:
            check_positive("heartbeat", heartbeat, "a number of seconds over 0, or None")
        self._heartbeat = heartbeat
        self._busy = False  # a task waits in `__anext__`
        self._opening = True  # some servers send the head of a response only with its first bytes
        self._over = False  # the last event was given, or the stream was closed
        self._reading: Task[tuple[bytes, bool]] | None = None
        super().__init__(stream)

    async def __anext__(self) -> bytes:
        """Return the next bytes to write. Cancelling it closes the stream.

        Raises:
            MoondreamError: Another task is reading. An error of the stream is not raised: it
                becomes an event.
        """
        if self._busy:
            raise MoondreamError("Another task is already reading this stream")
        self._busy = True
        try:
            if not self._over:
                self._stream._belong_to_reader()  # noqa: SLF001 - a part of the stream
                data = await self._next()
                if data:
                    return data
            await self.aclose()
        except BaseException:
            self._over = True
            self._stream._close_for_cancelled()  # noqa: SLF001 - likewise
            raise
        finally:
            self._busy = False
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        """Return the next events, or a heartbeat; nothing if it was closed meanwhile."""
        stream = self._stream
        opening, self._opening = self._opening, False
        if self._reading is None:
            data, over = _take(stream)
            if not data and self._heartbeat is None:
                data, over = await _read(stream)
            if data:
                return self._give(data, over=over)
            if opening:
                return HEARTBEAT
            from asyncio import create_task  # noqa: PLC0415 - importing the package stays light

            self._reading = create_task(_read(stream))
        from asyncio import wait  # noqa: PLC0415 - likewise

        reading = self._reading
        await wait([reading], timeout=self._heartbeat)
        if not reading.done():
            return HEARTBEAT
        self._reading = None
        data, over = reading.result()
        return self._give(data, over=over)

    def _give(self, data: bytes, *, over: bool) -> bytes:
        if self._over:  # closed meanwhile
            return b""
        self._over = over
        return data

    async def aclose(self) -> None:
        """Close the stream; from any task, at any time, and more than once.

        The connection of an unfinished answer is dropped at once, so that the server stops
        working. A task that waits for the next bytes gets the end.
        """
        self._over = True
        await super().aclose()
        if self._reading is not None:
            from asyncio import wait  # noqa: PLC0415 - as above

            await wait([self._reading])

    def close(self) -> None:
        """Close the stream without waiting, from any thread; Django calls it after a request."""
        self._over = True
        super().close()


async def _read(stream: Answer) -> tuple[bytes, bool]:
    """Wait for the next block; return its events, and whether they are the last."""
    data, over = b"", False
    while not data:
        try:
            await stream._pull()  # noqa: SLF001 - for the reader, to whom it belongs
        except StopAsyncIteration:
            return _done(stream), True
        except MoondreamError as error:
            return _failed(error), True
        data, over = _take(stream)
    return data, over


def _take(stream: Answer) -> tuple[bytes, bool]:
    """Return the events that have arrived, and whether they are the last."""
    block = stream._rest()  # noqa: SLF001 - a part of the stream
    data = b"".join(
        _encode("chunk", {"chunk": text}) if text else _without_text(block[i])
        for i, text in enumerate(block.texts)
    )
    if block and stream.completed:
        return data + _done(stream), True
    return data, False


def _without_text(event: StreamEvent) -> bytes:
    if isinstance(event, BboxEvent):
        return _encode("bbox", {"bbox": event.bbox})
    if isinstance(event, ReasoningEvent):
        return _encode("reasoning", {"text": event.text})
    return b""


def _done(stream: Answer) -> bytes:
    return _encode(
        "done", {name: getattr(stream, name) for name in _FACTS if hasattr(stream, name)}
    )


def _failed(error: MoondreamError) -> bytes:
    fields = {name: getattr(error, name) for name in _FAULT_FIELDS if hasattr(error, name)}
    said = {"type": type(error).__name__, "message": error.message, **fields}
    return _encode("error", {"error": said})


def _encode(name: str, data: dict[str, Any]) -> bytes:
    """Return one event. Its data is one line, since JSON escapes line breaks."""
    try:
        body = msgspec.json.encode(data)
    except UnicodeEncodeError:  # half a character: JSON can escape it, UTF-8 can't encode it
        import json  # noqa: PLC0415 - rarely needed

        body = json.dumps(msgspec.to_builtins(data)).encode()
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)
