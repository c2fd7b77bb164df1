"""Threads for work that would hold up an event loop: pictures, and looking up names.

asyncio's own threads are everybody's: a program that fills them with its own work would
keep each call waiting, and at its end Python waits for what they do. The workers here are the
package's own, and nobody waits for them at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

_T = TypeVar("_T")

_MANY = 8  # short jobs that wait, so that they are worth a thread of their own
_LONG = 0.005  # seconds: no short job, but one that waits, as for a drive of the network

_KEPT = 2.0  # seconds that a thread waits for its next job; to start one costs more than a job


class Workers:
    """A few threads that do one job each at a time, and end when there has been none for long.

    Who waits for a job may be cancelled. A job that nobody waits for is not begun; one that
    has begun keeps its thread until it is done, so that never more than `most` are at work.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = f"moondream_async {name}"
        self._most = most
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._jobs: deque[Any] = deque()
        self._ready = threading.Condition(threading.Lock())
        self._threads = 0
        self._idle = 0  # of these, those that wait for a job, or are about to take one

    def submit(
        self, function: Callable[..., _T], /, *args: Any, **kwargs: Any
    ) -> asyncio.Future[_T]:
        """Begin a job; await what is returned for its outcome, in the loop that runs now."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        with self._ready:
            self._jobs.append((future, function, args, kwargs))
            is_short = len(self._jobs) > self._idle and self._threads < self._most
            self._threads += is_short
            self._ready.notify()
        if is_short:
            # A daemon: a picture that takes long is not waited for when the program ends.
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def _work(self) -> None:
        while (job := self._next()) is not None:
            _do(*job)
            del job  # whose picture may be large

    def _next(self) -> Any:
        """Return a job; None, once the thread has to end."""
        with self._ready:
            if not self._jobs:
                self._idle += 1
                self._ready.wait(_KEPT)
                self._idle -= 1
            if self._jobs:
                return self._jobs.popleft()
            self._threads -= 1
            return None


def _do(future: asyncio.Future[_T], function: Callable[..., _T], args: Any, kwargs: Any) -> None:
    if future.cancelled():
        return
    result = error = None
    try:
        result = function(*args, **kwargs)
    except BaseException as raised:  # noqa: BLE001 - reported to the waiter
        error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)
    with contextlib.suppress(RuntimeError):  # the loop is closed
        future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class ShortJobs:
    """Short jobs of one event loop, as the reading of a small file: several in one hop.

    A hop to a thread and back costs more than such a job. The first goes at once; those that
    come meanwhile go together when it is back, or on another thread where it takes long, or
    where there are many.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._waiting: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []
        self._hops = 0  # under way
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Begin a job that raises nothing; await what is returned for its outcome."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._waiting.append((future, job))
        if not self._hops or len(self._waiting) >= _MANY:
            self._hop()
        elif self._timer is None:
            self._timer = loop.call_later(_LONG, self._hop)
        return future

    def _hop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wanted = [each for each in self._waiting if not each[0].cancelled()]
        self._waiting = []
        if wanted:
            self._hops += 1
            outcome = self._workers.submit(_do_all, [job for _, job in wanted])
            outcome.add_done_callback(partial(self._landed, [future for future, _ in wanted]))

    def _landed(self, futures: list[asyncio.Future[Any]], outcome: asyncio.Future[Any]) -> None:
        self._hops -= 1
        if not self._hops:
            self._hop()
        for future, result in zip(futures, outcome.result(), strict=True):
            if not future.done():  # cancelled
                future.set_result(result)


def _do_all(jobs: list[Callable[[], Any]]) -> list[Any]:
    return [job() for job in jobs]


_all: weakref.WeakSet[Workers] = weakref.WeakSet()


def _reset_all() -> None:
    """Forget the threads of the parent: a forked child has none of them."""
    for workers in _all:
        workers._reset()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
