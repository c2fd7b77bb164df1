"""A run: one task that reads the items, makes their calls, and keeps the results for a reader.

The task has a task group with a task for each item in progress. `_Work` holds all that these tasks
share with the reader, and has no reference to the reader's `BulkRun`. So dropping the `BulkRun`,
as with a plain ``break``, ends the run.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any, Generic

import anyio
import anyio.to_thread

from moondream_async._call.report import drop_frames
from moondream_async._call.retry import (
    LONGEST_RETRY_AFTER,
    backoff,
    is_refusal,
    is_worth_retrying,
)
from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ClientClosedError,
    MoondreamError,
    RequestError,
)

from .control import Control
from .items import Asking, BulkResult, ItemT, ResultT
from .progress import BulkProgress
from .results import Bell, Results

if TYPE_CHECKING:
    from moondream_async._call.call import Caller

Items = Iterable[ItemT] | AsyncIterable[ItemT]

_END: Any = object()
_REFUSALS_PER_RETRY = 3
"""How many refusals in a row count as one failure, while the server refuses all requests."""
_REFUSALS_OF_A_RUN = 10
"""The least number of refusals in a row, over all items, that ends a run when an item gives up."""


class BulkRun(Results[BulkResult[ItemT, ResultT]], Generic[ItemT, ResultT]):
    """The results of a bulk run, as an asynchronous iterator; see `MoondreamClient.bulk`.

    The run ends when its ``async with`` is left, by `aclose`, and when it is dropped, as with
    ``break``: open requests are cancelled, and their connections are closed. Inside ``async with``,
    cancelling a task that reads loses no result, and another task can read on; outside of it,
    cancelling ends the run.

    Raises:
        AuthenticationError: The server refuses the key. The run has ended.
        ClientClosedError: The client was closed. The run has ended.
        RateLimitError: The server has refused all requests for as long as a call would have
            waited, and items are left. The run has ended.
        Exception: The iterable of items raised it; the results of the items before it came
            first.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         run = client.bulk([md.SAMPLE_IMAGE] * 3, ordered=True)
    ...         async with run:
    ...             async for each in run:
    ...                 if each.index == 2:
    ...                     run.stop()  # takes no further item
    ...             await run.aclose()  # leaving `async with` does this, too
    ...             return run.progress.done
    >>> asyncio.run(main())
    3
    """

    _work: _Work

    def __init__(
        self,
        caller: Caller,
        items: Items[ItemT],
        asking: Asking,
        *,
        ordered: bool,
        concurrency: int | None,
        max_retries: int | None,
    ) -> None:
        work = _Work(
            caller,
            items,
            asking,
            ordered=ordered,
            most=min(concurrency or caller.session.slots.total, caller.session.slots.total),
            max_retries=caller.max_retries if max_retries is None else max_retries,
        )
        super().__init__(work, "bulk")

    def __repr__(self) -> str:
        return f"<BulkRun {self.progress!r}, {self.in_flight} under way>"

    @property
    def progress(self) -> BulkProgress:
        """The progress of the run: done, failed, rate, eta, tokens."""
        return self._work.progress

    @property
    def in_flight(self) -> int:
        """How many items are in progress."""
        return self._work.open

    @property
    def limit(self) -> int:
        """How many requests may be open at present."""
        return self._work.control.limit

    @property
    def paused_for(self) -> float:
        """Seconds until the end of the pause that the server asked for; 0 without a pause."""
        return max(0.0, self._work.control.paused_until - time.monotonic())

    def stop(self) -> None:
        """Take no more items. The iterator ends after the results of the items in progress."""
        self._work.stop()


class _Work:
    """The state of a run, and what its tasks do."""

    def __init__(
        self,
        caller: Caller,
        items: Items[Any],
        asking: Asking,
        *,
        ordered: bool,
        most: int,
        max_retries: int,
    ) -> None:
        self.control = Control(most)
        self.open = 0
        """Items in progress: prepared, sent, or waiting for another attempt."""
        self.closed = False
        self.progress = BulkProgress(len(items) if isinstance(items, Sized) else None)
        self._caller = caller
        self._items = items
        self._asking = asking
        self._ordered = ordered
        self._most = most
        self._max_retries = max_retries
        self._asked = 0  # open requests
        self._queue: deque[asyncio.Future[None]] = deque()  # of attempts that may not start yet
        self._timer: asyncio.TimerHandle | None = None  # where the rate alone holds them up
        self._resting: list[asyncio.Future[tuple[int, Any] | None]] = []  # tasks without an item
        self._is_fed = False
        self._ready, self._room = Bell(), Bell()
        self._hopeless: MoondreamError | None = None
        self._is_exhausted = False  # the iterable
        self._feeding: anyio.CancelScope | None = None
        self._stopped = False
        self._done: deque[BulkResult[Any, Any]] = deque()
        self._out_of_order: dict[int, BulkResult[Any, Any]] = {}
        self._next_index = 0
        self._failure: BaseException | None = None
        self._ended = False

    # -- the reader's side ----------------------------------------------------------

    async def next(self) -> BulkResult[Any, Any]:
        """Return the next result, or raise once the error that ended the run."""
        await self._ready.until(lambda: bool(self._done) or self._ended or self.closed)
        if self.closed:
            raise StopAsyncIteration
        if self._done:
            result = self._done.popleft()
            self.ring_for_room()
            return result
        failure, self._failure = self._failure, None
        if failure is None:
            raise StopAsyncIteration
        raise failure

    def close(self) -> None:
        """Drop all results that were not read, and keep no more."""
        self.closed = True
        self._done.clear()
        self._out_of_order.clear()
        self._ready.ring()  # `run` does not, if it is cancelled before it begins

    def stop(self) -> None:
        """Take no more items."""
        self._stopped = True
        if self._feeding is not None:
            self._feeding.cancel()

    # -- the run's side -------------------------------------------------------------

    async def run(self) -> None:
        """Do all items."""
        try:
            # Imported here, since several worker threads would import it at the same time.
            await anyio.to_thread.run_sync(importlib.import_module, "PIL.Image")
            self._feeding = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                try:
                    with self._feeding:
                        await self._feed(group)
                except Exception as error:  # noqa: BLE001 - reported to the reader
                    self._fail(error)
            if self._hopeless is not None and not self._is_exhausted:
                self._fail(self._hopeless)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._ended = True
            self._ready.ring()

    async def _feed(self, group: anyio.abc.TaskGroup) -> None:
        following = _reader(self._items)
        try:
            for index in itertools.count():
                await self._room.until(self._has_room)
                if self._stopped:
                    return
                item = await following()
                if item is _END:
                    self._is_exhausted = True
                    return
                self.open += 1
                if self._resting:
                    self._resting.pop().set_result((index, item))
                else:
                    group.start_soon(self._do_all, index, item)
                del item  # it may be large, and the next one may take long
        finally:
            self._is_fed = True
            for task in self._resting:
                if not task.done():  # cancelled, like this one
                    task.set_result(None)

    def _has_room(self) -> bool:
        """Tell whether another item may be taken.

        Up to twice `limit` items may be in progress or wait for the reader: so others go on while
        some wait for another attempt. In order, up to twice as many as requests may ever be open,
        since one item may delay many.
        """
        waiting = len(self._done) + len(self._out_of_order)
        room = 2 * (self._most if self._ordered else self.control.limit)
        return self.open + waiting < room

    async def _do_all(self, index: int, item: Any) -> None:
        """Do one item, and then the items that `_feed` hands over."""
        while True:
            await self._do(index, item)
            del item  # it may be large, and the task may rest for long
            given = None if self._is_fed else await self._rest()
            if given is None:
                return
            index, item = given
            del given

    async def _rest(self) -> tuple[int, Any] | None:
        """Wait for an item; return None at the end of the items."""
        rest = asyncio.get_running_loop().create_future()
        self._resting.append(rest)
        given: tuple[int, Any] | None = await rest
        return given

    async def _do(self, index: int, item: Any) -> None:
        began = time.monotonic()
        call = result = error = None
        try:
            image, make = self._asking.about(item)
            turns = _Turns(self, self._max_retries)
            call = self._caller.call(make(image), retries=turns, admission=turns)
            result = await call.result()
        except (AuthenticationError, ClientClosedError) as fatal:
            # All other items would fail, too.
            self._fail(fatal)
            return
        except MoondreamError as failure:
            error = failure
            drop_frames(error)
        except Exception as bug:  # noqa: BLE001 - reported to the reader, and not that all is well
            self._fail(bug)
            return
        finally:
            self.open -= 1  # which makes no room: its result waits for the reader
        self._keep(
            BulkResult(
                item=item,
                index=index,
                result=result,
                error=error,
                tries=0 if call is None else call.report.attempt,
                seconds=time.monotonic() - began,
            )
        )

    def _keep(self, result: BulkResult[Any, Any]) -> None:
        self.progress.count(result)
        if self.closed:
            return
        if not self._ordered:
            self._done.append(result)
        else:
            self._out_of_order[result.index] = result
            while self._next_index in self._out_of_order:
                self._done.append(self._out_of_order.pop(self._next_index))
                self._next_index += 1
        self._ready.ring()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self.stop()

    def give_up(self, error: MoondreamError) -> None:
        """An item was refused too often: end the run, if other items were refused, too."""
        if self._hopeless is None and self.control.refusals >= _REFUSALS_OF_A_RUN:
            self._hopeless = error
            self.stop()

    async def enter(self) -> None:
        """Wait in a queue until a request may start."""
        if not self._queue and self._starts():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it was admitted at the same moment
                self._asked -= 1
                self._let_in()
            raise

    def _starts(self) -> bool:
        """Start a request if one may start now; if not, make sure that this is tried again."""
        if self._asked >= self.control.limit:
            return False  # until `leave`
        now = time.monotonic()
        delay = self.control.delay(now)
        if delay > 0:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(delay, self._let_in_later)
            return False
        self.control.started(now)
        self._asked += 1
        return True

    def _let_in_later(self) -> None:
        self._timer = None
        self._let_in()

    def _let_in(self) -> None:
        """Admit waiting attempts in their order, as many as may start now."""
        while self._queue:
            if not self._queue[0].done():  # cancelled
                if not self._starts():
                    return
                self._queue[0].set_result(None)
            self._queue.popleft()

    def leave(self, error: MoondreamError | None, sent_at: float, *, answered: bool) -> None:
        """Report the outcome of a request to the control, and let the next requests start."""
        now = time.monotonic()
        if answered:
            full = self._asked >= self.control.limit
            self.control.succeeded(now, now - sent_at, full=full)
        elif isinstance(error, APIStatusError):
            if is_refusal(error):
                self.control.refused(now, sent_at=sent_at, retry_after=error.retry_after)
            elif error.status in (502, 503, 504, 520, 521, 522, 523, 524):
                self.control.overloaded(now, sent_at=sent_at)
            else:
                self.control.took(now)
        elif isinstance(error, (APITimeoutError, APIConnectionError)):
            self.control.overloaded(now, sent_at=sent_at)
        self._asked -= 1
        self._let_in()
        self.ring_for_room()

    def ring_for_room(self) -> None:
        """Wake the task that takes the items, if another item may be taken."""
        if self._has_room():
            self._room.ring()


class _Turns:
    """The admission and the retries of one item's call."""

    def __init__(self, work: _Work, most: int) -> None:
        self.most = most
        self._work = work
        self._sent_at = 0.0
        self._failures = 0
        self._refusals = 0
        self._refused_at = float("-inf")
        self._refused_since = float("-inf")

    async def enter(self) -> None:
        """Wait until the next attempt may start."""
        await self._work.enter()
        self._sent_at = time.monotonic()

    def leave(self, error: MoondreamError | None, *, answered: bool) -> None:
        """Note the end of an attempt."""
        self._work.leave(error, self._sent_at, answered=answered)

    def delay(self, error: MoondreamError, *, jitter: float, left: float) -> float | None:
        """Return the seconds until the next attempt; None for no further attempt.

        While the server accepts other requests, a refusal does not count: the item tries again,
        however long that takes.
        """
        if is_refusal(error):
            return self._delay_after_refusal(error, jitter)
        timed_out = isinstance(error, APITimeoutError) and error.phase != "total"
        if self._failures >= self.most or not (timed_out or is_worth_retrying(error)):
            return None
        retry_after = error.retry_after if isinstance(error, APIStatusError) else None
        seconds = backoff(self._failures, jitter, retry_after)
        if seconds >= left:
            return None
        self._failures += 1
        return seconds

    def _delay_after_refusal(self, error: MoondreamError, jitter: float) -> float | None:
        now = time.monotonic()
        if self._work.control.accepted_at >= self._refused_at:
            self._refusals = 0
            self._refused_since = now
        self._refused_at = now
        self._refusals += 1
        too_many = self._refusals > self.most * _REFUSALS_PER_RETRY
        too_long = now - self._refused_since >= self.most * LONGEST_RETRY_AFTER
        if too_many or (too_long and self._refusals > self.most):
            self._work.give_up(error)
            return None
        # The pause that the server asked for holds for the whole run: see `Control.refused`.
        return backoff(self._refusals - 1, 0.5 + jitter / 2)

    def succeeded(self) -> None:
        """The call has its answer."""


def _reader(items: Items[Any]) -> Callable[[], Awaitable[Any]]:
    """Return a function that returns the next item each time, and `_END` at the end.

    The iterator belongs to the caller, who may read on after the run, so it is not closed.
    """
    if isinstance(items, AsyncIterable):
        later = aiter(items)
        return lambda: anext(later, _END)
    now = iter(items)

    async def following() -> Any:
        return next(now, _END)

    return following


def check_items(items: Any) -> None:
    """Raise unless `items` is an iterable of pictures.

    Raises:
        RequestError: `items` is no iterable, or is a string, bytes or a mapping.
    """
    one = isinstance(items, (str, bytes, bytearray, dict))
    if one or not isinstance(items, (Iterable, AsyncIterable)):
        raise RequestError(f"items must be an iterable of pictures, not {items!r:.100}")
