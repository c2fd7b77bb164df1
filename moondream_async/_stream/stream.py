"""The stream types: an answer as it is written, over any source of bytes.

A stream pulls. It asks its source for bytes only when somebody asks it for
text and has nothing left to give, so it needs no task and no queue, and a slow
reader slows the server. Each block of bytes is decoded at once; the events in
it are then handed out one by one.

Who holds whom: the caller holds the stream, the stream its source and its
clock, and nobody holds the stream. So it is freed the moment it is dropped, and
frees its connection with it. No exception is kept in it, since the frames of a
traceback lead back here.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from moondream_async._protocol.events import AnswerDecoder
from moondream_async._protocol.plain import NOTHING, Block
from moondream_async._protocol.secret import conceal
from moondream_async.errors import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    MoondreamError,
    Phase,
    StreamInterruptedError,
    StreamStalledError,
)
from moondream_async.results import Reasoning, Region, StreamEvent, Usage
from moondream_async.types import Timeout

from .clock import Clock, running_loop
from .relay import Chunks, EventStream

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import anyio


class ByteSource(Protocol):
    """Where the bytes of one stream come from."""

    async def __anext__(self) -> bytes:
        """Return the next bytes; StopAsyncIteration at the clean end.

        Raises:
            APIConnectionError: The connection broke. Whatever had arrived before
                was returned first.
            ClientClosedError: The client closed it.
        """

    def close(self) -> None:
        """Drop the connection now, from any thread; a waiting reader is woken with an error.

        Closing twice does nothing.
        """

    async def finish(self) -> None:
        """Wait, shortly, for the end of a body whose events are complete.

        So the connection can be used for the next request.
        """

    @property
    def closed(self) -> bool:
        """Whether the connection was given back or dropped."""


class Opening(NamedTuple):
    """What a stream starts from, and starts from again when a try fails before its first event."""

    decoder: AnswerDecoder
    source: ByteSource | None = None  # None: the whole answer is in `events`
    events: Block = NOTHING
    sent_at: float | None = None  # on the loop's clock
    waited: float = 0.0  # seconds already spent on waiting for the first event


Reopen = Callable[[MoondreamError], Awaitable[Opening]]
"""Takes a failure before the first event; returns the next try, or raises it."""


class Observer(Protocol):
    """Is told what becomes of a stream."""

    def first_chunk(self, request_id: str | None) -> None:
        """The first piece of text is there."""

    def ended(
        self, *, error: MoondreamError | None, completed: bool, request_id: str | None
    ) -> None:
        """It was read to the end, failed, was closed, or was dropped."""


class Stream:
    """An answer as it is written; iterate over it, or over `chunk`, which is the same.

    One task reads at a time. A task that is cancelled while it waits leaves the
    stream whole: another read goes on where it stopped. `aclose` it, leave its
    ``async with``, or read it to the end; a stream that is dropped before that
    closes its connection and warns.

    Reading raises:
        StreamInterruptedError: The connection ended before the answer did.
        StreamStalledError: Nothing came for `Timeout.idle`, or `Timeout.total` is over.
        StreamServerError: The server reported an error in the stream.
        StreamProtocolError: What came are not events.
        APITimeoutError: Nothing at all came for `Timeout.first_event`.
        ClientClosedError: The stream or its client was closed before or meanwhile.
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_cause",
        "_clock",
        "_closed",
        "_decoder",
        "_forsaken",
        "_observer",
        "_opened_at",
        "_reading",
        "_ready",
        "_reopen",
        "_reopening",
        "_sent_at",
        "_source",
        "_text",
        "_timed_out",
        "_timeout",
        "_total_at",
        "_ttft",
        "_unread",
    )

    _key: ClassVar[str] = "chunk"

    def __init__(
        self,
        opening: Opening,
        *,
        timeout: Timeout | None = None,
        total_at: float | None = None,
        reopen: Reopen | None = None,
        opened_at: str | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._timeout = timeout or Timeout()
        self._total_at = total_at
        self._reopen = reopen
        self._reopening: anyio.CancelScope | None = None
        self._opened_at = opened_at
        self._observer = observer
        self._text: list[str] = []  # of the blocks before this one
        self._ttft: float | None = None
        self._cause: BaseException | None = None
        self._timed_out: Phase | None = None
        self._reading = False
        self._closed = False
        self._forsaken = False  # by a reader of `chunk` who was cancelled, which is no mistake
        self._unread = False  # text, when it was closed
        self._attach(opening)
        if opening.events:
            self._take(opening.events)

    def _attach(self, opening: Opening) -> None:
        self._decoder = opening.decoder
        self._source = opening.source
        self._sent_at = opening.sent_at
        self._clock: Clock | None = None
        if opening.source is not None:
            self._clock = Clock(opening.source, self._timeout, self._total_at, opening.waited)
        self._block = NOTHING
        self._ready: Iterator[str] = iter(())

    # -- reading ------------------------------------------------------------------

    @property
    def chunk(self) -> AsyncIterator[str]:
        """The pieces of text, as they arrive. It keeps the stream alive by itself.

        But once the task that reads it was cancelled, it does so no more: a web framework
        whose browser has gone may keep it for long. Who holds the stream can read on.
        """
        return Chunks(self)

    @property
    def events(self) -> AsyncIterator[StreamEvent]:
        """Typed events in place of text, those of unknown kinds included.

        It reads on from where the text was read to, and the other way round.
        """
        return _Events(self)

    def __getitem__(self, key: str) -> Any:
        """Return the pieces for ``chunk`` and the skill's own key; else the attribute."""
        if key in ("chunk", self._key):
            return self.chunk
        if key in ("request_id", "finish_reason", "metrics", "reasoning", "usage"):
            return getattr(self, key)
        raise KeyError(key)

    # By its items alone it would pass for a sequence, and Django would read it as one.
    __iter__ = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """Return the next piece of text."""
        while True:
            for chunk in self._ready:
                if chunk:
                    return chunk
            await self._fill()

    async def text(self) -> str:
        """Read to the end; return all the text that had not been read yet.

        When it raises or is cancelled, `text_so_far` has what had arrived.
        """
        return "".join([piece async for piece in self])

    def sse(self, *, heartbeat: float | None = 15.0) -> EventStream:
        """Pass the rest of the stream on as Server-Sent Events, in bytes, as to a browser.

        Events of these names follow, each with a JSON object as its data::

            chunk      {"chunk": "..."}, a piece of the text
            reasoning  {"text": "..."}, a piece of what the model thinks; of a chat
            bbox       {"bbox": {...}}, as soon as it is known; of an outline
            done       request_id, finish_reason, metrics, usage and reasoning, and of an
                       outline bbox, path and parse_error; null what the server didn't say
            error      {"error": {"type": the exception's name, "message": "...", ...}}, and
                       `status` or `phase`, where it has one

        The last one is either ``done`` or ``error``: what goes wrong is not raised here.
        A comment, which readers overlook, comes first, so that the browser gets the head of
        the answer, and whenever nothing has come from the server for `heartbeat` seconds;
        None sends none. Comments are no progress to `Timeout`.

        Closing it, dropping it, and cancelling the task that reads it close the stream at
        once; web frameworks do one of these when the browser has gone. aiohttp.web does so
        with ``handler_cancellation=True``. Without, as with Starlette under servers of ASGI
        2.4, the next write fails, which is after a `heartbeat` at the latest.

        Its `headers` belong to the answer that carries it. An ``EventSource`` is to be
        closed at ``done`` and ``error``: it would ask again.

        Raises:
            RequestError: `heartbeat` is no positive number.
        """
        return EventStream(self, heartbeat)

    # -- what is known ------------------------------------------------------------

    @property
    def text_so_far(self) -> str:
        """All the text that was handed out."""
        return "".join([*self._text, *self._block.texts[: self._given()]])

    @property
    def completed(self) -> bool:
        """Whether the server's word that the answer is complete has arrived."""
        return self._decoder.completed

    @property
    def request_id(self) -> str | None:
        """The server's id for the request, once it has said it."""
        return self._decoder.request_id

    @property
    def finish_reason(self) -> str | None:
        """``stop``, or ``length`` when the answer was cut at `max_tokens`; known at the end."""
        return self._decoder.finish_reason

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Tokens and times under the server's own names; known at the end."""
        return self._decoder.metrics

    @property
    def reasoning(self) -> Reasoning | None:
        """What the model thought, once the server has said it."""
        return self._decoder.reasoning

    @property
    def usage(self) -> Usage | None:
        """Token counts, as chat gives them; known at the end."""
        return self._decoder.usage

    @property
    def ttft(self) -> float | None:
        """Seconds from the sending of the request to the first piece of text."""
        return self._ttft

    def __repr__(self) -> str:
        state = "complete" if self.completed else "closed" if self._is_over() else "open"
        name = type(self).__name__
        return f"<{name} {state}, {len(self.text_so_far)} characters, request {self.request_id}>"

    # -- the end ------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the stream; any task may, at any time, and again.

        An unfinished one drops its connection at once, so that the server stops
        working; a task that is waiting for text gets a `ClientClosedError`. A
        finished one gives its connection back. Cancelling it drops the connection.
        """
        try:
            if self.completed and self._source is not None:
                await self._source.finish()
        finally:
            self._close()

    def _close(self) -> None:
        text = self.text_so_far
        if not self._closed:
            self._closed = True
            self._unread = not self.completed or any(self._ready)
        self._text = [text]
        self._block = NOTHING
        self._ready = iter(())
        self._drop_source()
        self._report(None)
        if self._reopening is not None:
            self._reopening.cancel()

    def _report(self, error: MoondreamError | None) -> None:
        """Tell the observer, once, that this is the end."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.ended(error=error, completed=self.completed, request_id=self.request_id)

    def _drop_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _is_over(self) -> bool:
        return self._source is None or self._source.closed

    def __del__(self) -> None:
        try:
            over = self._is_over() or self.completed or self._forsaken
            self._drop_source()
            self._report(None)
        except (AttributeError, ImportError):
            return  # its construction failed; the interpreter ends, and asyncio is in debug mode
        if not over:
            where = f", opened at {self._opened_at}" if self._opened_at else ""
            warnings.warn(
                f"{type(self).__name__} was dropped before its end{where}: its connection is "
                "closed. Read it to the end, use 'async with', or aclose() it.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    # -- filling ------------------------------------------------------------------

    def _take(self, block: Block) -> None:
        """Make `block` the one to hand out; the one before is used up."""
        self._text.append("".join(self._block.texts))
        self._block = block
        self._ready = iter(block.texts)
        if self._ttft is None and self._sent_at is not None and any(block.texts):
            self._ttft = running_loop().time() - self._sent_at
            if self._observer is not None:
                self._observer.first_chunk(self.request_id)

    def _given(self) -> int:
        """How many events of the block have been handed out."""
        return len(self._block) - operator.length_hint(self._ready)

    def _rest(self) -> Block:
        """Hand out all that is left of the block."""
        rest = self._block[self._given() :]
        self._ready = iter(())
        return rest

    def _next_event(self) -> StreamEvent | None:
        """Hand out the next event of the block; None if it is used up."""
        for _ in self._ready:
            return self._block[self._given() - 1]
        return None

    async def _fill(self) -> None:
        """Wait until there are events to hand out.

        Raises:
            StopAsyncIteration: There will be none; the answer is complete.
        """
        if self._reading:
            raise MoondreamError("Another task is already reading this stream")
        self._reading = True
        try:
            while True:
                reopen = None if self._decoder.failure is None else self._another_try()
                if reopen is not None:
                    block = await self._try_again(reopen)
                else:
                    self._check()
                    if self._decoder.completed:
                        await self._finish()
                        raise StopAsyncIteration  # noqa: TRY301 - once a stream
                    block = await self._receive()
                if block.texts:
                    self._reopen = None  # from here on, trying again would say things twice
                    self._take(block)
                    return
        except StopAsyncIteration:
            self._report(None)
            raise
        except MoondreamError as error:
            self._report(conceal(error, self._decoder.secret))
            raise error  # noqa: TRY201 - a bare one, on 3.10, brings the frames back
        finally:
            self._reading = False

    def _check(self) -> None:
        """Raise what there is to raise."""
        decoder = self._decoder
        if decoder.failure is not None:
            self._drop_source()
            raise decoder.failure(partial=self.text_so_far) from self._cause
        if self._timed_out is not None:
            raise self._timeout_error(self._timed_out)
        if self._unread:
            raise ClientClosedError("The stream was closed before its end")

    async def _finish(self) -> None:
        if self._source is not None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None
            source, self._source = self._source, None
            try:
                await source.finish()
            finally:
                source.close()

    async def _receive(self) -> Block:
        """Wait for the next bytes and decode them; mostly, that is one event or more."""
        source, clock = self._source, self._clock
        if source is None or clock is None:  # closed meanwhile
            raise ClientClosedError("The stream was closed before its end")
        block = NOTHING
        if not source.closed:  # as it is when its event loop is gone; then there is no wait
            clock.start()
        try:
            data = await source.__anext__()
        except StopAsyncIteration:
            block = self._decoder.end()
        except (APIConnectionError, ClientClosedError) as error:
            if self._closed:
                raise ClientClosedError("The stream was closed while it was read") from error
            if clock.expired is not None:
                self._timed_out = clock.expired
                self._drop_source()
                raise self._timeout_error(clock.expired) from error
            if isinstance(error, ClientClosedError):
                self._drop_source()
                raise
            block = self._decoder.end()
            self._cause = error.with_traceback(None)
        else:
            block = self._decoder.feed(data)
        finally:
            clock.stop(progress=bool(block.texts))
        return block

    def _another_try(self) -> Reopen | None:
        """Return how to ask again, where the connection was lost before the first event."""
        failure = self._decoder.failure
        lost = failure is not None and isinstance(failure(), StreamInterruptedError)
        return self._reopen if lost and not self._closed else None

    async def _try_again(self, reopen: Reopen) -> Block:
        """Ask again; return the answer, if it comes whole.

        Cancelling it changes nothing: whoever reads next tries again.
        """
        from anyio import CancelScope  # noqa: PLC0415 - importing the package stays light

        self._drop_source()
        lost = APIConnectionError("The stream ended before the answer was complete")
        lost.__cause__ = self._cause
        self._reopening = scope = CancelScope()
        with scope:
            try:
                opening = await reopen(lost)
            except MoondreamError as error:
                self._reopen = None
                if error is lost:  # no try left
                    return NOTHING
                raise
            finally:
                self._reopening = None
                lost.__traceback__ = None  # which leads to this frame, and so back to it
            if self._closed:
                if opening.source is not None:
                    opening.source.close()
            else:
                self._cause = None
                self._attach(opening)
                return opening.events
        raise ClientClosedError("The stream was closed while it was read")

    def _timeout_error(self, phase: Phase) -> MoondreamError:
        seconds = getattr(self._timeout, phase)
        if phase == "first_event":
            return APITimeoutError(
                f"The answer did not begin within {seconds:g} seconds (Timeout.first_event)",
                phase=phase,
            )
        reason = "Nothing came for" if phase == "idle" else "The answer was not complete within"
        return StreamStalledError(
            f"{reason} {seconds:g} seconds (Timeout.{phase})",
            phase=phase,
            partial=self.text_so_far,
        )


class CaptionStream(Stream):
    """A description, as it is written. ``stream["caption"]`` is the same as `chunk`."""

    __slots__ = ()
    _key = "caption"


class QueryStream(Stream):
    """An answer, as it is written. ``stream["answer"]`` is the same as `chunk`."""

    __slots__ = ()
    _key = "answer"


class SegmentStream(Stream):
    """The outline of an object, as it is drawn.

    The pieces are those of a first, coarse path. `path` is the refined one, which
    replaces them; it comes with the end.
    """

    __slots__ = ()
    _key = "path"

    def __getitem__(self, key: str) -> Any:
        """Return the pieces for ``chunk``; ``path`` and ``bbox`` are the attributes."""
        if key in ("path", "bbox", "parse_error"):
            return getattr(self, key)
        return super().__getitem__(key)

    @property
    def bbox(self) -> Region | None:
        """Where the object is, as soon as the server has said it."""
        return self._decoder.bbox

    @property
    def path(self) -> str | None:
        """SVG path data, whose coordinates are 0-1 of `bbox`; known at the end."""
        return self._decoder.path

    @property
    def parse_error(self) -> str | None:
        """What was wrong with the outline that the model wrote, in the server's words."""
        return self._decoder.parse_error


class ChatStream(Stream):
    """The next turn of a conversation, as it is written. ``stream["message"]`` is `chunk`.

    `reasoning` grows while the model thinks; `events` has its pieces as they come.
    """

    __slots__ = ()
    _key = "message"


class _Events:
    """A stream read as events."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamEvent:
        stream = self._stream
        while True:
            event = stream._next_event()  # noqa: SLF001 - a part of the stream
            if event is not None:
                return event
            await stream._fill()  # noqa: SLF001
