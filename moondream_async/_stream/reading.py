"""How a stream is read and closed, over any source of bytes; `stream` is what callers see.

A stream pulls: it asks its source for bytes only when a caller asks for text and no event is
left to hand out. So it needs no task and no queue, and a slow reader slows the server. Each
block of bytes is decoded at once, and its events are handed out one by one.

The caller holds the stream, the stream holds its source and its clock, and nothing else holds
the stream. So a stream that is dropped is freed at once, and its connection with it. It keeps
no exception, since the frames of a traceback would hold the stream. It belongs to the task that
reads it (`owner`), and is closed when that task is cancelled.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Coroutine, Iterator
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from moondream_async._protocol.chunks import NOTHING, Block
from moondream_async._protocol.events import MAX_ANSWER_CHARACTERS
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
from moondream_async.results import StreamEvent
from moondream_async.types import Timeout

from .clock import Clock, running_loop
from .opening import Observer, Opening, Reopen
from .owner import Owner, cancelled_error, running_task

if TYPE_CHECKING:
    import anyio

_CLOSED = "The stream was closed before its end"
SUPERSEDED = "The stream was superseded by a newer one"
_CLOSED_UNDER_READER = "The stream was closed while it was read"
_CANCELLED = (
    "The stream was closed when the task that read it was cancelled, as by a time limit. To wait "
    "for text with a limit and read on, use Timeout(idle=...), or asyncio.wait() on a task that "
    "reads"
)


class Reading:
    """The private half of `Stream`: it fills the stream with events, and ends it."""

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
        self._said: StringIO | None = None  # the text of all blocks before `_block`
        self._ttft: float | None = None
        self._cause: BaseException | None = None
        self._timed_out: Phase | None = None
        self._reading = False
        self._closed = ""  # why the stream was closed; empty while it is open
        self._unread = False  # whether text was left when the stream was closed
        self._owner: Owner | None = None
        self._relayed = False  # whether it is sent on: a cancelled reader is then a normal end
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

    # -- the end

    def _close(self, why: str = _CLOSED) -> None:
        if not self._closed:
            if self._next_attempt() is not None:
                self._decoder.failure = None  # another attempt would have followed
            self._closed = why
            self._keep(self._block.texts[: self._given()])
            self._unread = not self._decoder.completed or any(self._ready)
            self._block = NOTHING
            self._ready = iter(())
        self._drop_source()
        is_cancelled = why == _CANCELLED and not self._relayed
        self._report(cancelled_error() if is_cancelled else None)
        if self._reopening is not None:
            self._reopening.cancel()

    def _close_for_cancelled(self) -> None:
        """Close the stream, since the task that reads it was cancelled."""
        if not self._is_over():
            self._close(_CANCELLED)

    def _report(self, error: BaseException | None) -> None:
        """Notify the observer, once, of the end of the stream."""
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.ended(
                error=error,
                completed=self._decoder.completed,
                request_id=self._decoder.request_id,
                finish_reason=self._decoder.finish_reason,
                metrics=self._decoder.metrics,
                usage=self._decoder.usage,
                ttft=self._ttft,
                answer=self._text() if observer.wants_answer else None,
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

    def __del__(self) -> None:
        try:
            over = self._is_over() or self._decoder.completed
            self._drop_source()
            self._report(None)
        except (AttributeError, ImportError):
            return  # `__init__` failed, or the interpreter ends while asyncio is in debug mode
        if not over:
            where = f", opened at {self._opened_at}" if self._opened_at else ""
            warnings.warn(
                f"{type(self).__name__} was dropped before its end{where}: its connection is "
                "closed. Read it to the end, use 'async with', or aclose() it.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    # -- filling

    def _take(self, block: Block) -> None:
        """Hand out the events of `block` next; those of the last block are all handed out."""
        self._keep(self._block.texts)
        self._block = block
        self._ready = iter(block.texts)
        if self._ttft is None and self._sent_at is not None and any(block.texts):
            self._ttft = running_loop().time() - self._sent_at
            if self._observer is not None:
                self._observer.first_chunk(self._decoder.request_id)
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
        """Return how many events of the block have been handed out."""
        return len(self._block) - operator.length_hint(self._ready)

    def _text(self) -> str:
        """Return the text that was handed out so far."""
        before = "" if self._said is None else self._said.getvalue()
        return before + "".join(self._block.texts[: self._given()])

    def _rest(self) -> Block:
        """Hand out the rest of the block."""
        rest = self._block.after(self._given())
        self._ready = iter(())
        return rest

    def _next_event(self) -> StreamEvent | None:
        """Hand out the next event of the block; None if there is none left."""
        for _ in self._ready:
            return self._block[self._given() - 1]
        return None

    def _fill(self) -> Coroutine[Any, Any, None]:
        """Make the running task the owner, and wait until there are events to hand out.

        Raises:
            StopAsyncIteration: All events were handed out; the answer is complete.
        """
        self._belong_to_reader()
        return self._pull()

    def _belong_to_reader(self) -> None:
        """Make the running task the owner, unless another task is waiting for text."""
        task, owner = running_task(), self._owner
        if (owner is None or owner.task() is not task) and not self._reading:
            if owner is not None:
                owner.leave()
            over = task is None or self._is_over()
            self._owner = None if over else Owner(self, task)  # type: ignore[arg-type]

    async def _pull(self) -> None:
        """Wait until there are events to hand out; the owner stays."""
        if self._reading:
            if self._closed:
                raise ClientClosedError(self._closed)
            raise MoondreamError("Another task is already reading this stream")
        self._reading = True
        try:
            while True:
                reopen = None if self._decoder.failure is None else self._next_attempt()
                if reopen is not None:
                    block = await self._attempt_again(reopen)
                else:
                    self._check()
                    if self._decoder.completed:
                        await self._finish()
                        raise StopAsyncIteration  # noqa: TRY301 - once a stream
                    block = await self._receive()
                if block.texts:
                    self._reopen = None  # another attempt would repeat these events
                    self._take(block)
                    return
        except StopAsyncIteration:
            self._report(None)
            raise
        except MoondreamError as error:
            self._fail(error)
            raise
        except BaseException:  # the task is cancelled, or Ctrl-C was pressed
            self._close(_CANCELLED)
            raise
        finally:
            self._reading = False

    def _fail(self, error: MoondreamError) -> None:
        if self._closed == SUPERSEDED:
            raise StopAsyncIteration from None
        self._reopen = None  # it holds the call, with what the server sent
        self._decoder.forget()
        self._headers = self._decoder.secret.value(self._headers)  # they may quote the key
        if isinstance(error, APIStatusError) and not error.headers:
            error.headers = self._headers
        self._report(self._decoder.secret.error(error))

    def _check(self) -> None:
        """Raise the error that has ended the stream, if one has."""
        decoder = self._decoder
        if decoder.failure is not None:
            self._drop_source()
            raise decoder.failure(partial=self._text()) from self._cause
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
        """Wait for bytes until they complete an event, or end the answer."""
        source, clock, decoder = self._source, self._clock, self._decoder
        if source is None or clock is None:  # closed meanwhile
            raise ClientClosedError(self._closed or _CLOSED)
        if not source.closed:  # a source whose event loop is gone is closed, and can't wait
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

    def _next_attempt(self) -> Reopen | None:
        """Return what makes another attempt, if the connection was lost before the first event."""
        failure = self._decoder.failure
        lost = failure is not None and isinstance(failure(), StreamInterruptedError)
        return self._reopen if lost and not self._closed else None

    async def _attempt_again(self, reopen: Reopen) -> Block:
        """Make another attempt; return the events that have come with it.

        Cancelling it ends the attempt, and closes the stream.
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
                if error is lost:  # no attempt is left
                    return NOTHING
                # Kept without its traceback, for a caller who reads on.
                self._decoder.failure = partial(_again, copy.copy(error))
                self._cause = None
                raise
            finally:
                self._reopening = None
                lost.__traceback__ = None  # a cycle: it holds this frame, which holds `lost`
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
            partial=self._text(),
        )


def _again(error: MoondreamError, **_: Any) -> MoondreamError:
    """Return the error that has ended the last attempt, for another reader."""
    return copy.copy(error)
