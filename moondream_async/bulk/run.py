"""A run: one task that reads the items, asks about them, and keeps what a reader will take.

The task owns a task group with a task for each item that is under way. All that
the reader and those share is in `_Work`, which does not know the reader's object:
so a reader who drops that, as with a plain ``break``, ends the run.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import random
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, cast

import anyio
import anyio.to_thread
from anyio import current_time

from moondream_async._call.retry import backoff, is_worth_retrying
from moondream_async._protocol.answers import read_result
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
from .items import Asking, BulkResult, ItemT, Make

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from moondream_async._call.call import Caller
    from moondream_async.types import EncodedImage

Items = Iterable[ItemT] | AsyncIterable[ItemT]

_END: Any = object()
_REFUSALS_PER_RETRY = 3
"""How many refusals in a row count as one failure, while the server lets nobody else in."""


class BulkRun(Generic[ItemT]):
    """The results of a bulk run, as an asynchronous iterator; see `MoondreamClient.bulk`.

    Leaving ``async with``, `aclose`, and dropping it, as with ``break``, end the run:
    what is under way is cancelled, and its connections are closed. Inside ``async
    with``, cancelling a reader takes nothing from the next; elsewhere it ends the run.
    """

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
        self._task: asyncio.Task[None] | None = None
        self._entered = False
        self._work = _Work(
            caller,
            items,
            asking,
            ordered=ordered,
            most=min(concurrency or caller.session.slots.total, caller.session.slots.total),
            max_retries=caller.max_retries if max_retries is None else max_retries,
        )

    @property
    def in_flight(self) -> int:
        """How many items are under way."""
        return self._work.open

    @property
    def limit(self) -> int:
        """How many requests may be open just now."""
        return self._work.control.limit

    def stop(self) -> None:
        """Take no more items. The iterator ends when those under way are done."""
        self._work.stop()

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BulkResult[ItemT]:
        """Return the next result.

        Raises:
            AuthenticationError: The server knows no such key. The run has ended.
            ClientClosedError: The client was closed. The run has ended.
            Exception: What the iterable of items raised, after the results of those
                that came before.
        """
        if self._task is None and not self._work.closed:
            # A task of the event loop's, and the task group inside it: a group that was
            # opened here would have to be closed in this very task, by whoever reads last.
            self._task = asyncio.create_task(self._work.run(), name="moondream_async bulk")
        try:
            return cast("BulkResult[ItemT]", await self._work.next())
        except asyncio.CancelledError:
            if not self._entered:
                await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the run, and return when nothing of it is left. May be called twice."""
        self._work.close()
        if self._task is not None:
            self._task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._task])

    def __del__(self) -> None:
        task = self._task
        if task is None or task.done():
            return
        self._work.close()
        loop = task.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(task.cancel)


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
        """Items under way: being prepared, asked about, or waiting for another try."""
        self.closed = False
        self._caller = caller
        self._items = items
        self._asking = asking
        self._ordered = ordered
        self._most = most
        self._max_retries = max_retries
        self._asked = 0  # requests that are on their way, and pictures that are prepared for one
        # Of anyio, and so made in the loop: a run may be made before there is one.
        self._door: anyio.Lock  # one at a time looks whether it may start, in line
        self._changed: anyio.Event | None = None
        self._feeding: anyio.CancelScope | None = None
        self._stopped = False
        self._done: deque[BulkResult[Any]] = deque()
        self._out_of_order: dict[int, BulkResult[Any]] = {}
        self._next_index = 0
        self._failure: BaseException | None = None
        self._ended = False

    # -- the reader's side ----------------------------------------------------------

    async def next(self) -> BulkResult[Any]:
        """Return the next result, or raise what ended the run, once."""
        await self._until(lambda: bool(self._done) or self._ended or self.closed)
        if self.closed:
            raise StopAsyncIteration
        if self._done:
            result = self._done.popleft()
            self.changed()
            return result
        failure, self._failure = self._failure, None
        if failure is None:
            raise StopAsyncIteration
        raise failure

    def close(self) -> None:
        """Keep nothing more for a reader."""
        self.closed = True
        self._done.clear()
        self._out_of_order.clear()

    def stop(self) -> None:
        """Take no more items, and wait for none."""
        self._stopped = True
        if self._feeding is not None:
            self._feeding.cancel()

    # -- the run's side -------------------------------------------------------------

    async def run(self) -> None:
        """Do all items."""
        try:
            # Here, and not by the first of many threads that meets a picture which needs it:
            # the others would find it half loaded.
            await anyio.to_thread.run_sync(importlib.import_module, "PIL.Image")
            self._door = anyio.Lock()
            self._feeding = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                try:
                    with self._feeding:
                        await self._feed(group)
                except Exception as error:  # noqa: BLE001 - the reader is told
                    self._fail(error)
        finally:
            self._ended = True
            self.changed()

    async def _feed(self, group: anyio.abc.TaskGroup) -> None:
        following = _reader(self._items)
        for index in itertools.count():
            await self._until(self._has_room)
            if self._stopped:
                return
            item = await following()
            if item is _END:
                return
            self.open += 1
            group.start_soon(self._do, index, item)

    def _has_room(self) -> bool:
        """Tell whether another item may be taken.

        Those that wait for a reader count, and so do those that wait for another try: then
        others go on in their places, up to twice as many. In order, one may hold up many.
        """
        waiting = len(self._done) + len(self._out_of_order)
        room = 2 * (self._most if self._ordered else self.control.limit)
        return self.open + waiting < room

    async def _do(self, index: int, item: Any) -> None:
        began = current_time()
        tries = _Tries()
        result = error = None
        try:
            image, make = self._asking.about(item)
            result = await self._ask(image, make, tries)
        except (AuthenticationError, ClientClosedError) as fatal:
            # No other item would fare better.
            self._fail(fatal)
            return
        except MoondreamError as failure:
            error = failure
            _drop_frames(error)
        except Exception as bug:  # noqa: BLE001 - the reader is told, and not that all is well
            self._fail(bug)
            return
        finally:
            self.open -= 1
            self.changed()
        self._keep(
            BulkResult(
                item=item,
                index=index,
                result=result,
                error=error,
                tries=tries.sent,
                seconds=current_time() - began,
            )
        )

    def _keep(self, result: BulkResult[Any]) -> None:
        if self.closed:
            return
        if not self._ordered:
            self._done.append(result)
        else:
            self._out_of_order[result.index] = result
            while self._next_index in self._out_of_order:
                self._done.append(self._out_of_order.pop(self._next_index))
                self._next_index += 1
        self.changed()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self.stop()

    async def _ask(self, image: Any, make: Make, tries: _Tries) -> Any:
        """Ask about a picture until there is an answer, or another try can't help."""
        encoded: EncodedImage | None = None
        sent_at = 0.0
        while True:
            await self._enter()
            try:
                if encoded is None:
                    encoded = await self._caller.encode(image)
                    request = make(encoded)
                tries.sent += 1
                sent_at = current_time()
                raw = await self._caller.call(request, max_retries=0).json()
                result = read_result(self._asking.skill, raw)
                full = self._asked >= self.control.limit
                self.control.succeeded(current_time(), current_time() - sent_at, full=full)
            except MoondreamError as error:
                self._tell(error, sent_at=sent_at)
                delay = tries.delay(error, self._max_retries, self.control.accepted_at)
                if delay is None:
                    raise
            else:
                return result
            finally:
                self._asked -= 1
                self.changed()
            await anyio.sleep(delay)

    async def _enter(self) -> None:
        """Wait until a request may start."""
        async with self._door:
            while True:
                await self._until(lambda: self._asked < self.control.limit)
                delay = self.control.delay(current_time())
                if delay <= 0:
                    break
                await anyio.sleep(delay)
            self.control.started(current_time())
            self._asked += 1

    def _tell(self, error: MoondreamError, *, sent_at: float) -> None:
        """Let the control know what a failure says about the server."""
        now = current_time()
        if isinstance(error, APIStatusError):
            if _is_refusal(error):
                self.control.refused(now, sent_at=sent_at, retry_after=error.retry_after)
            elif error.status in (502, 503, 504, 520, 521, 522, 523, 524):
                self.control.overloaded(now, sent_at=sent_at)
            else:
                self.control.took(now)
        elif isinstance(error, (APITimeoutError, APIConnectionError)):
            self.control.overloaded(now, sent_at=sent_at)

    def changed(self) -> None:
        """Wake whoever waits for something."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._changed is None:
                self._changed = anyio.Event()
            await self._changed.wait()


class _Tries:
    """How often one item was tried, and what came of it."""

    def __init__(self) -> None:
        self.sent = 0
        self._failures = 0
        self._refusals = 0
        self._failed_at = float("-inf")

    def delay(self, error: MoondreamError, most: int, accepted_at: float) -> float | None:
        """Return the seconds until the next try; None if there is to be none.

        A refusal says nothing about this item while others are let in: it has to wait for
        its turn, however long that takes.
        """
        jitter = random.random()  # noqa: S311 - no secret
        if isinstance(error, APIStatusError) and _is_refusal(error):
            if accepted_at > self._failed_at:
                self._refusals = 0
            self._failed_at = current_time()
            self._refusals += 1
            if self._refusals > most * _REFUSALS_PER_RETRY:
                return None
            return backoff(self._refusals - 1, 0.5 + jitter / 2, error.retry_after)
        timed_out = isinstance(error, APITimeoutError) and error.phase != "total"
        if self._failures >= most or not (timed_out or is_worth_retrying(error)):
            return None
        self._failures += 1
        retry_after = error.retry_after if isinstance(error, APIStatusError) else None
        return backoff(self._failures - 1, jitter, retry_after)


def _is_refusal(error: APIStatusError) -> bool:
    """Tell 429, and Station's full queue, which comes with status 200."""
    rejected = isinstance(error.body, dict) and error.body.get("status") == "rejected"
    return error.status == 429 or rejected


def _reader(items: Items[Any]) -> Callable[[], Awaitable[Any]]:
    """Return what gives the next item each time, and `_END` at the end.

    The iterator is the caller's: it is not closed, and may be read on after the run.
    """
    if isinstance(items, AsyncIterable):
        later = aiter(items)
        return lambda: anext(later, _END)
    now = iter(items)

    async def following() -> Any:
        return next(now, _END)

    return following


def _drop_frames(error: BaseException | None) -> None:
    """Let go of what the code was busy with, as the picture: results may be kept for long."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def check_items(items: Any) -> None:
    """Refuse what is one picture and not many.

    Raises:
        RequestError: It can't be iterated over, or is a string, bytes or a mapping.
    """
    one = isinstance(items, (str, bytes, bytearray, dict))
    if one or not isinstance(items, (Iterable, AsyncIterable)):
        raise RequestError(f"items must be an iterable of pictures, not {items!r:.100}")
