"""Threads for work that would block an event loop: preparing pictures, looking up names.

The program shares asyncio's own threads: if it fills them with other work, each call would have
to wait, and Python waits for them at its end. The workers of this module belong to the package,
and Python does not wait for them at its end.
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

_MANY = 8  # so many waiting short jobs are worth another thread
_LONG = 0.005  # seconds after which a job is not short: it waits, as for a network drive

_KEPT = 2.0  # seconds that a thread waits for its next job; starting a thread costs more than a job


class Workers:
    """A few threads that do one job at a time each, and end when no job has come for a while.

    A task that waits for a job may be cancelled. A job that no task waits for is not started; a
    job that has started keeps its thread to its end, so that at most `most` jobs run at once.
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
        self._idle = 0  # how many of the threads wait for a job, or are about to take one

    def submit(
        self, function: Callable[..., _T], /, *args: Any, **kwargs: Any
    ) -> asyncio.Future[_T]:
        """Begin a job; return a future of the running loop that gives its result."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        with self._ready:
            self._jobs.append((future, function, args, kwargs))
            is_short = len(self._jobs) > self._idle and self._threads < self._most
            self._threads += is_short
            self._ready.notify()
        if is_short:
            # A daemon, so that the end of the program does not wait for a picture.
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system allows no more threads
                self._do_without(error)
        return future

    def _do_without(self, error: RuntimeError) -> None:
        """Leave the jobs to the other threads; fail them if there is none."""
        with self._ready:
            self._threads -= 1
            if self._threads:
                return
            jobs, self._jobs = self._jobs, deque()
        for future, *_ in jobs:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                future.get_loop().call_soon_threadsafe(_settle, future, None, error)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            _do(*job)
            del job  # its picture may be large

    def _next(self) -> Any:
        """Return a job; None if the thread must end."""
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
    """Short jobs of one event loop, as the reading of a small file: a thread does several at once.

    A hop to a thread and back costs more than such a job. The first job goes at once. The jobs
    that come meanwhile go together when the first is back; or on another thread, if the first
    takes long or many jobs wait.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._waiting: list[tuple[asyncio.Future[Any], Callable[[], Any]]] = []
        self._hops = 0  # in threads at present
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, job: Callable[[], _T]) -> asyncio.Future[_T]:
        """Begin a job that raises nothing; return a future that gives its result."""
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
        failed = outcome.exception() is not None  # no thread could be had
        results = [None] * len(futures) if failed else outcome.result()
        for future, result in zip(futures, results, strict=True):
            if not future.done():  # cancelled
                future.set_result(result)


def _do_all(jobs: list[Callable[[], Any]]) -> list[Any]:
    return [job() for job in jobs]


_all: weakref.WeakSet[Workers] = weakref.WeakSet()


def _reset_all() -> None:
    """Forget the threads of the parent process: a forked child has none of them."""
    for workers in _all:
        workers._reset()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
