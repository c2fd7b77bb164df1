"""A stream: an answer as it is written, over any source of bytes.

A stream pulls. It asks its source for bytes only when somebody asks it for
text and has nothing left to give, so it needs no task and no queue, and a slow
reader slows the server. Each block of bytes is decoded at once; the events in
it are then handed out one by one.

Who holds whom: the caller holds the stream, the stream its source and its
clock, and nobody holds the stream. So it is freed the moment it is dropped, and
frees its connection with it. No exception is kept in it, since the frames of a
traceback lead back here. It belongs to the task that reads it (`owner`), and is
closed with it when that task is cancelled.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, Self

from moondream_async._protocol.chunks import NOTHING, Block
from moondream_async._protocol.events import MAX_ANSWER_CHARACTERS
from moondream_async._protocol.secret import conceal
from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ClientClosedError,
    MoondreamError,
    Phase,
    StreamInterruptedError,
    StreamStalledError,
)
from moondream_async.results import Reasoning, Result, StreamEvent, Usage
from moondream_async.types import Timeout

from .clock import Clock, running_loop
from .opening import Observer, Opening, Reopen
from .owner import Owner, cancelled_error, running_task
from .readers import Events, Pieces, Reader
from .relay import ByteStream, EventStream

if TYPE_CHECKING:
    from types import TracebackType

    import anyio
    from typing_extensions import TypeVar

    ItemT_co = TypeVar("ItemT_co", default=Any, covariant=True)
else:
    from typing import TypeVar

    ItemT_co = TypeVar("ItemT_co", covariant=True)

_CLOSED = "The stream was closed before its end"
_SUPERSEDED = "The stream was superseded by a newer one"
_CLOSED_UNDER_READER = "The stream was closed while it was read"
_CANCELLED = (
    "The stream was closed when the task that read it was cancelled, as by a time limit. To wait "
    "for text with a limit and read on, use Timeout(idle=...), or asyncio.wait() on a task that "
    "reads"
)


class Stream(Generic[ItemT_co]):
    """An answer as it is written; iterate over it, or over `chunk`.

    A stream belongs to the task that reads it, one at a time. When that task is cancelled,
    while it waits for text or between two pieces, the stream is closed, whoever still holds
    it: the server stops working for a reader who has gone. To wait with a limit and read on,
    use `Timeout.idle`, or ``asyncio.wait`` on a task that reads.

    `aclose` a stream, leave its ``async with``, or read it to the end; one that is dropped
    before that closes its connection and warns.

    Reading raises:
        StreamInterruptedError: The connection ended before the answer did.
        StreamStalledError: Nothing came for `Timeout.idle`, or `Timeout.total` is over.
        StreamServerError: The server reported an error in the stream.
        StreamProtocolError: What came are not events.
        APITimeoutError: Nothing at all came for `Timeout.first_event`.
        ClientClosedError: The stream or its client was closed before or meanwhile, or the task
            that read it was cancelled.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         stream = await client.caption(md.SAMPLE_IMAGE, "short", stream=True)
    ...         async for piece in stream.chunk:  # `stream.events` has more
    ...             first = piece
    ...             break
    ...         await stream.aclose()  # which `async with stream:` does
    ...         return first
    >>> asyncio.run(main())
    'A'
    """

    __slots__ = (
        "__weakref__",
        "_block",
        "_cause",
        "_clock",
        "_closed",
        "_decoder",
        "_headers",
        "_observer",
        "_opened_at",
        "_owner",
        "_reading",
        "_ready",
        "_relayed",
        "_reopen",
        "_reopening",
        "_said",
        "_sent_at",
        "_source",
        "_timed_out",
        "_timeout",
        "_total_at",
        "_ttft",
        "_unread",
    )

    _key: ClassVar[str] = "chunk"
    _items: ClassVar[type[Reader[Any]]] = Pieces

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
        self._said: StringIO | None = None  # the text of the blocks before this one
        self._ttft: float | None = None
        self._cause: BaseException | None = None
        self._timed_out: Phase | None = None
        self._reading = False
        self._closed = ""  # why, once it is
        self._unread = False  # text, when it was closed
        self._owner: Owner | None = None
        self._relayed = False  # whoever cancels its reader then is a browser that has gone
        self._attach(opening)
        if opening.events:
            self._take(opening.events)

    def _attach(self, opening: Opening) -> None:
        self._decoder = opening.decoder
        self._source = opening.source
        self._sent_at = opening.sent_at
        self._headers = opening.headers
        self._clock: Clock | None = None
        if opening.source is not None:
            self._clock = Clock(opening.source, self._timeout, self._total_at, opening.waited)
        self._block = NOTHING
        self._ready: Iterator[str] = iter(())

    # -- reading ------------------------------------------------------------------

    @property
    def chunk(self) -> AsyncIterator[str]:
        """The pieces of text, as they arrive. The iterator alone keeps the stream alive."""
        return Pieces(self)

    @property
    def events(self) -> AsyncIterator[StreamEvent]:
        """Typed events in place of text, those of unknown kinds included.

        It reads on from where the text was read to, and the other way round.
        """
        return Events(self)

    def __getitem__(self, key: str) -> Any:
        """Return the pieces for ``chunk`` and the skill's own key; else the attribute."""
        if key in ("chunk", self._key):
            return self.chunk
        if key in ("request_id", "finish_reason", "metrics", "reasoning", "usage"):
            return getattr(self, key)
        raise KeyError(key)

    # By its items alone it would pass for a sequence, and Django would read it as one.
    __iter__ = None

    def __aiter__(self) -> AsyncIterator[ItemT_co]:
        self._belong_to_reader()
        return self._items(self)  # a loop has its own: see `readers`

    def __anext__(self) -> Coroutine[Any, Any, ItemT_co]:
        """Return the next piece of text. Cancelling it closes the stream."""
        return self._items.next_of(self)

    async def text(self) -> str:
        """Read to the end; return all of the text, what was handed out before included.

        When it raises, `text_so_far` has what had arrived; so it has when it is cancelled,
        which closes the stream.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return await stream.text() == await stream.text()
        >>> asyncio.run(main())
        True
        """
        while True:
            self._ready = iter(())
            try:
                await self._fill()
            except StopAsyncIteration:
                return self.text_so_far

    async def result(self) -> Result:
        """Read to the end; return the whole result, as the call without `stream` gives it.

        Raises what `text` raises. Cancelling it closes the stream.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return sorted(await stream.result())
        >>> asyncio.run(main())
        ['caption', 'request_id']
        """
        return self._decoder.result(await self.text(), self._headers)

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

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             events = stream.sse()
        ...             async for piece in events:  # blocks of whole events
        ...                 last = piece
        ...     return events.headers["Content-Type"], b"event: done" in last
        >>> asyncio.run(main())
        ('text/event-stream', True)
        """
        relay = EventStream(self, heartbeat)
        self._relayed = True
        return relay

    def chunk_bytes(self) -> ByteStream:
        """Pass the rest of the text on as plain text, in bytes: UTF-8.

        Its `headers` belong to the answer that carries it. What goes wrong on the way is raised,
        so that the answer breaks off instead of passing for a whole one. Closing it, dropping it,
        and cancelling the task that reads it close the stream at once.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             data = b"".join([piece async for piece in stream.chunk_bytes()])
        ...             return data.decode() == stream.text_so_far
        >>> asyncio.run(main())
        True
        """
        self._relayed = True
        return ByteStream(self)

    # -- what is known ------------------------------------------------------------

    @property
    def text_so_far(self) -> str:
        """All the text that was handed out."""
        before = "" if self._said is None else self._said.getvalue()
        return before + "".join(self._block.texts[: self._given()])

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the server's response; their names are looked up in any case."""
        return self._headers

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

    if not TYPE_CHECKING:  # type checkers say by themselves that there are none

        def __enter__(self) -> NoReturn:
            raise TypeError("A stream is entered with 'async with': its end may be waited for")

        __exit__ = __enter__

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

    def _close(self, why: str = _CLOSED) -> None:
        if not self._closed:
            if self._another_try() is not None:
                self._decoder.failure = None  # it was no end yet
            self._closed = why
            self._keep(self._block.texts[: self._given()])
            self._unread = not self.completed or any(self._ready)
            self._block = NOTHING
            self._ready = iter(())
        self._drop_source()
        is_cancelled = why == _CANCELLED and not self._relayed
        self._report(cancelled_error() if is_cancelled else None)
        if self._reopening is not None:
            self._reopening.cancel()

    def supersede(self) -> None:
        """End it, since something newer has come; whoever reads it meets its end, and no error.

        What had arrived stays in `text_so_far`, and `completed` tells whether that is all.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         stream = await client.caption(md.SAMPLE_IMAGE, stream=True)
        ...         stream.supersede()
        ...         return [piece async for piece in stream.chunk]
        >>> asyncio.run(main())
        []
        """
        self._close(_SUPERSEDED)

    def _close_for_cancelled(self) -> None:
        """Close it, since the task that reads it was cancelled."""
        if not self._is_over():
            self._close(_CANCELLED)

    def _report(self, error: BaseException | None) -> None:
        """Tell the observer, once, that this is the end."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.ended(
                error=error,
                completed=self.completed,
                request_id=self.request_id,
                finish_reason=self.finish_reason,
                metrics=self.metrics,
                usage=self.usage,
                ttft=self.ttft,
                answer=self.text_so_far if observer.wants_answer else None,
            )

    def _drop_source(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
        if self._owner is not None:
            self._owner.leave()
            self._owner = None

    def _is_over(self) -> bool:
        if self._source is None:
            return self._reopening is None
        return self._source.closed

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} can't be copied: it is one connection, read once")

    def __del__(self) -> None:
        try:
            over = self._is_over() or self.completed
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
        self._keep(self._block.texts)
        self._block = block
        self._ready = iter(block.texts)
        if self._ttft is None and self._sent_at is not None and any(block.texts):
            self._ttft = running_loop().time() - self._sent_at
            if self._observer is not None:
                self._observer.first_chunk(self.request_id)
        if self._observer is not None:
            self._observer.chunks(block.texts)

    def _keep(self, texts: list[str]) -> None:
        text = "".join(texts)
        if text:
            if self._said is None:
                self._said = StringIO()
            self._said.write(text)
            if self._said.tell() > MAX_ANSWER_CHARACTERS and not self._decoder.done:
                self._decoder.fail_for_length()

    def _given(self) -> int:
        """How many events of the block have been handed out."""
        return len(self._block) - operator.length_hint(self._ready)

    def _rest(self) -> Block:
        """Hand out all that is left of the block."""
        rest = self._block.after(self._given())
        self._ready = iter(())
        return rest

    def _next_event(self) -> StreamEvent | None:
        """Hand out the next event of the block; None if it is used up."""
        for _ in self._ready:
            return self._block[self._given() - 1]
        return None

    def _fill(self) -> Coroutine[Any, Any, None]:
        """Wait until there are events to hand out, for the task that runs, which owns it now.

        Raises:
            StopAsyncIteration: There will be none; the answer is complete.
        """
        self._belong_to_reader()
        return self._pull()

    def _belong_to_reader(self) -> None:
        """Belong to the task that runs, unless another one waits for text just now."""
        task, owner = running_task(), self._owner
        if (owner is None or owner.task() is not task) and not self._reading:
            if owner is not None:
                owner.leave()
            over = task is None or self._is_over()
            self._owner = None if over else Owner(self, task)  # type: ignore[arg-type]

    async def _pull(self) -> None:
        """Wait until there are events to hand out; whoever reads."""
        if self._reading:
            if self._closed:
                raise ClientClosedError(self._closed)
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
            self._fail(error)
            raise
        except BaseException:  # the task is cancelled, or the interpreter interrupted
            self._close(_CANCELLED)
            raise
        finally:
            self._reading = False

    def _fail(self, error: MoondreamError) -> None:
        if self._closed == _SUPERSEDED:
            raise StopAsyncIteration from None
        self._reopen = None  # and with it the call, with all that the server said
        self._decoder.forget()
        self._headers = self._decoder.secret.value(self._headers)  # which may quote the key, too
        if isinstance(error, APIStatusError) and not error.headers:
            error.headers = self._headers
        self._report(conceal(error, self._decoder.secret))

    def _check(self) -> None:
        """Raise what there is to raise."""
        decoder = self._decoder
        if decoder.failure is not None:
            self._drop_source()
            raise decoder.failure(partial=self.text_so_far) from self._cause
        if self._timed_out is not None:
            raise self._timeout_error(self._timed_out)
        if self._unread:
            raise ClientClosedError(self._closed)

    async def _finish(self) -> None:
        source, self._source = self._source, None
        self._drop_source()
        if source is not None:
            try:
                await source.finish()
            finally:
                source.close()

    async def _receive(self) -> Block:
        """Wait for bytes until they complete an event, or show that there will be none."""
        source, clock, decoder = self._source, self._clock, self._decoder
        if source is None or clock is None:  # closed meanwhile
            raise ClientClosedError(self._closed or _CLOSED)
        if not source.closed:  # as it is when its event loop is gone; then there is no wait
            clock.start()
        block = NOTHING
        try:
            while not block.texts and not decoder.done:
                block = decoder.feed(await source.__anext__())
        except StopAsyncIteration:
            block = decoder.end()
        except (APIConnectionError, ClientClosedError) as error:
            if self._closed:
                raise ClientClosedError(
                    _CANCELLED if self._closed == _CANCELLED else _CLOSED_UNDER_READER
                ) from error
            if clock.expired_phase is not None:
                self._timed_out = clock.expired_phase
                self._drop_source()
                raise self._timeout_error(self._timed_out) from error
            if isinstance(error, ClientClosedError):
                self._drop_source()
                raise
            block = decoder.end()
            self._cause = error.with_traceback(None)
        clock.stop()
        return block

    def _another_try(self) -> Reopen | None:
        """Return how to ask again, where the connection was lost before the first event."""
        failure = self._decoder.failure
        lost = failure is not None and isinstance(failure(), StreamInterruptedError)
        return self._reopen if lost and not self._closed else None

    async def _try_again(self, reopen: Reopen) -> Block:
        """Ask again; return the answer, if it comes whole.

        Cancelling it ends the try, and closes the stream.
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
        raise ClientClosedError(_CLOSED_UNDER_READER)

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
