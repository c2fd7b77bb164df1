"""The results of work in a task of its own, for a reader who may be cancelled or walk away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

import anyio

_T = TypeVar("_T")


class Bell:
    """Wakes the tasks that wait for a change."""

    def __init__(self) -> None:
        self._event: asyncio.Event | None = None

    def ring(self) -> None:
        """Wake all tasks that wait."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is checked at each `ring`."""
        while not condition():
            if self._event is None:
                self._event = asyncio.Event()
            await self._event.wait()


class _Work(Protocol):
    """What the task and the reader share; it has no reference to the `Results`."""

    closed: bool

    async def run(self) -> None: ...
    async def next(self) -> Any: ...
    def close(self) -> None: ...


class Results(Generic[_T]):
    """The results, as an asynchronous iterator; the work ends as it is left, closed or dropped."""

    def __init__(self, work: _Work, name: str) -> None:
        self._work = work
        self._name = name
        self._task: asyncio.Task[None] | None = None
        self._entered = False

    async def __aenter__(self) -> Self:
        self._entered = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _T:
        """Return the next result."""
        if self._task is None and not self._work.closed:
            # A task group that is opened here would have to be closed by the same task, and
            # another task may read the last result.
            self._task = asyncio.create_task(self._work.run(), name=f"moondream_async {self._name}")
        try:
            result: _T = await self._work.next()
        except asyncio.CancelledError:
            if not self._entered:
                await self.aclose()
            raise
        return result

    async def aclose(self) -> None:
        """End it, and return when all its tasks have ended. May be called twice."""
        self._work.close()
        if self._task is not None:
            self._task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._task])

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} can't be copied: it is one run, read once")

    def __del__(self) -> None:
        task = self._task
        if task is None or task.done():
            return
        loop = task.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._work.close)
            loop.call_soon_threadsafe(task.cancel)
