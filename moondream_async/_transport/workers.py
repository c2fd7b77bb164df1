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
from typing import Any, TypeVar

_T = TypeVar("_T")

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


_all: weakref.WeakSet[Workers] = weakref.WeakSet()


def _reset_all() -> None:
    """Forget the threads of the parent: a forked child has none of them."""
    for workers in _all:
        workers._reset()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
