"""Threads for work that would hold up an event loop: pictures, and looking up names.

asyncio's own threads are everybody's: a program that fills them with its own work would
keep each call waiting, and at its end Python waits for what they do. These are ours alone,
and nobody waits for them at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")


class Workers:
    """A few threads, started as they are needed, that do one job each at a time.

    Who waits for a job may be cancelled. A job that nobody waits for is not begun; one that
    has begun keeps its thread until it is done, so that never more than `most` are at work.
    """

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._unfinished = 0

    def submit(
        self, function: Callable[..., _T], /, *args: Any, **kwargs: Any
    ) -> asyncio.Future[_T]:
        """Begin a job; await what is returned for its outcome, in the loop that runs now."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        with self._lock:
            self._unfinished += 1
            is_short = self._threads < min(self._unfinished, self._most)
            self._threads += is_short
        if is_short:
            # A daemon: a picture that takes long is not waited for when the program ends.
            name = f"moondream_async {self._name}"
            threading.Thread(target=self._work, args=(self._jobs,), name=name, daemon=True).start()
        self._jobs.put((future, function, args, kwargs))
        return future

    def _work(self, jobs: SimpleQueue[Any]) -> None:
        while True:
            _do(*jobs.get())
            with self._lock:
                self._unfinished -= 1


def _do(future: asyncio.Future[_T], function: Callable[..., _T], args: Any, kwargs: Any) -> None:
    if future.cancelled():
        return
    result = error = None
    try:
        result = function(*args, **kwargs)
    except BaseException as raised:  # noqa: BLE001 - whoever waits is told
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
