"""A stream passed on: the iterators over it that a web server sends to a browser from.

Web frameworks differ in how they let go of what they iterate over when the browser has
gone. Some close it; some cancel the task that reads, be it waiting for more or writing to a
browser that reads slowly; and some of those leave it to the garbage collector, since an
exception keeps the frames of that task, and they what was read. So a reader's task is
watched: when it ends by being cancelled, `Chunks` drops the stream, which is closed unless
somebody else holds it, and `EventStream` closes it.

For `EventStream`, each block of the stream's events that has arrived becomes one piece of
bytes, so that fast answers take few writes. When there is none, the next is waited for, and
a heartbeat is given in its place when that takes long.

While it is waited for, and only then, there is a task, since the wait must go on while a
heartbeat is on its way: it may be in the middle of another try at the request, which would
begin anew. So the server's limits (`Timeout`) run on under heartbeats, too. The task ends
with one block, and the next begins when that has been taken: nothing is read ahead of a
slow browser but that. Without heartbeats there is no task.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from moondream_async._protocol.plain import Block
from moondream_async.errors import ClientClosedError, MoondreamError, RequestError
from moondream_async.results import BboxEvent, ReasoningEvent, StreamEvent

if TYPE_CHECKING:
    from asyncio import Task
    from typing import Self

HEARTBEAT = b":\n\n"
"""A comment: readers of events overlook it, and proxies see that the line is in use."""

_HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx, and others after it, would hold back what is short
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
    """What of a stream is used here."""

    _forsaken: bool
    _ready: Iterator[str]

    @property
    def completed(self) -> bool:
        """Whether all of it has arrived."""

    async def aclose(self) -> None:
        """Give its connection back, or drop it if there is more to come."""

    async def _fill(self) -> None: ...

    def _rest(self) -> Block: ...

    def _close(self) -> None: ...


class _Watch:
    """An eye on the task that reads: closes what is read when that was cancelled.

    It keeps neither of them alive.
    """

    __slots__ = ("_current_task", "_task", "_what")

    def __init__(self, what: Chunks | EventStream) -> None:
        from asyncio import current_task  # noqa: PLC0415 - importing the package stays light

        self._current_task = current_task
        self._what = weakref.ref(what)
        self._task: Callable[[], Task[Any] | None] = _nobody

    def look(self) -> None:
        """Look at the task that runs now."""
        task = self._current_task()
        if task is not self._task() and task is not None:
            self.end()
            self._task = weakref.ref(task)
            task.add_done_callback(self)

    def __call__(self, task: Task[Any]) -> None:
        what = self._what()
        if what is not None and task.cancelled():
            what.close()

    def end(self) -> None:
        """Look no more: a task may live long, and read many streams."""
        task = self._task()
        if task is not None:
            task.remove_done_callback(self)


def _nobody() -> None:
    return None


class Chunks(AsyncIterator[str]):
    """The pieces of a stream's text. It keeps the stream alive, until its reader is cancelled."""

    __slots__ = ("__weakref__", "_lost", "_stream", "_watch")

    def __init__(self, stream: Answer) -> None:
        self._lost: weakref.ref[Answer] | None = None
        self._watch: _Watch | None = None
        self._stream: Answer | None = stream

    async def __anext__(self) -> str:
        """Return the next piece of text.

        Cancelling it drops the stream. Who holds the stream can read on, here as well.

        Raises:
            ClientClosedError: Nobody did.
        """
        stream = self._stream or self._found()
        watch = self._watch
        if watch is None:
            self._watch = watch = _Watch(self)
            watch.look()
        try:
            while True:
                for chunk in stream._ready:  # noqa: SLF001 - a part of the stream
                    if chunk:
                        return chunk
                watch.look()
                await stream._fill()  # noqa: SLF001 - a part of the stream
        except Exception:
            raise
        except BaseException as error:
            # The frames below hold the stream, and whoever keeps the exception holds them.
            error.__traceback__ = None
            del stream
            self.close()
            raise error  # noqa: TRY201 - a bare one, on 3.10, brings the frames back

    async def aclose(self) -> None:
        """Close the stream, as its own does."""
        stream = self._stream
        if stream is not None:
            await stream.aclose()

    def close(self) -> None:
        """Drop the stream; it is closed unless somebody else holds it. From any thread.

        Django calls it at the end of a request.
        """
        stream = self._stream
        if stream is not None:
            stream._forsaken = True  # noqa: SLF001 - a part of the stream
            self._lost = weakref.ref(stream)
            self._stream = None

    def _found(self) -> Answer:
        self._stream = None if self._lost is None else self._lost()
        if self._stream is None:
            raise ClientClosedError(
                "The stream was closed when the task that read it was cancelled"
            )
        return self._stream

    def __del__(self) -> None:
        if self._watch is not None:
            self._watch.end()


class EventStream(AsyncIterator[bytes]):
    """A stream as Server-Sent Events: whole events and comments, in bytes; see `Stream.sse`.

    It ends when it was read to the end, when it is closed, when whoever waits for it is
    cancelled, and when it is dropped; and the stream with it.
    """

    __slots__ = (
        "__weakref__",
        "_busy",
        "_heartbeat",
        "_opening",
        "_over",
        "_reading",
        "_stream",
        "_watch",
    )

    def __init__(self, stream: Answer, heartbeat: float | None) -> None:
        if heartbeat is not None and not _is_positive(heartbeat):
            raise RequestError(
                f"heartbeat must be a positive number of seconds or None, not {heartbeat!r}"
            )
        self._heartbeat = heartbeat
        self._busy = False  # somebody waits
        self._opening = True  # some servers hold the head of an answer back until it has a body
        self._over = False  # what comes last was given, or it was closed
        self._reading: Task[tuple[bytes, bool]] | None = None
        self._watch = _Watch(self)
        self._stream = stream

    @property
    def headers(self) -> dict[str, str]:
        """Headers for the answer that carries it: its type, and to cache and hold back nothing."""
        return dict(_HEADERS)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return what is to be written next.

        Cancelling it closes the stream.

        Raises:
            MoondreamError: Another task waits for the same. Whatever goes wrong with the
                stream is no exception here, but an event.
        """
        if self._busy:
            raise MoondreamError("Another task is already reading this stream")
        self._busy = True
        try:
            if not self._over:
                self._watch.look()
                data = await self._next()
                if data:
                    return data
            await self.aclose()
        except BaseException:
            self.close()
            raise
        finally:
            self._busy = False
        raise StopAsyncIteration

    async def _next(self) -> bytes:
        """Return what is ready, or comes, or a heartbeat; nothing if it was closed meanwhile."""
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
        """End it, and the stream with it; any task may, at any time, and again.

        An unfinished answer's connection is dropped at once, so that the server stops
        working. A task that waits for more sees the end.
        """
        self._over = True
        await self._stream.aclose()
        if self._reading is not None:
            from asyncio import wait  # noqa: PLC0415 - as above

            await wait([self._reading])

    def close(self) -> None:
        """End it, and the stream with it, without waiting; from any thread.

        Django calls it at the end of a request.
        """
        self._over = True
        self._stream._close()  # noqa: SLF001 - a part of the stream

    def __del__(self) -> None:
        try:
            self.close()
        except (AttributeError, ImportError):
            return  # its construction failed; the interpreter ends
        self._watch.end()


def _is_positive(seconds: Any) -> bool:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return False
    return 0 < seconds < math.inf


async def _read(stream: Answer) -> tuple[bytes, bool]:
    """Wait for what comes next; return it as events, and whether it is the last."""
    data, over = b"", False
    while not data:
        try:
            await stream._fill()  # noqa: SLF001 - a part of the stream
        except StopAsyncIteration:
            return _done(stream), True
        except MoondreamError as error:
            return _failed(error), True
        data, over = _take(stream)
    return data, over


def _take(stream: Answer) -> tuple[bytes, bool]:
    """Return all that has arrived as events, and whether it is the last."""
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
    """Return one event. JSON has no line breaks but escaped ones, so its data is one line."""
    try:
        body = msgspec.json.encode(data)
    except UnicodeEncodeError:  # half a character, which UTF-8 can't say, and JSON can
        import json  # noqa: PLC0415 - it hardly ever happens

        body = json.dumps(msgspec.to_builtins(data)).encode()
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)
