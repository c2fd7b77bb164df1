"""The owner of a stream: the task that reads it.

Code in an ``async for`` can be cancelled while it waits for text, and between two pieces. The
stream notices the first by itself. This module notices the second, in two places: when the task
ends cancelled, and when the loop is left while the task is being cancelled, as by
``asyncio.timeout`` or a cancel scope.

An `Owner` keeps neither the task nor the stream alive. A task may live long and read many
streams, so it holds an `Owner` only as long as it owns the stream.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from asyncio import Task


class Owner:
    """The task that read a stream last."""

    __slots__ = ("_stream", "task")

    def __init__(self, stream: Owned, task: Task[Any]) -> None:
        self._stream = weakref.ref(stream)
        self.task = weakref.ref(task)
        task.add_done_callback(self)

    def __call__(self, task: Task[Any]) -> None:
        """Close the stream if `task`, which has ended, was cancelled."""
        stream = self._stream()
        if stream is not None and task.cancelled():
            stream._close_for_cancelled()  # noqa: SLF001 - a part of the stream

    def leave(self) -> None:
        """Give up the stream."""
        task = self.task()
        if task is not None:
            task.remove_done_callback(self)


class Owned(Protocol):
    """The part of a stream that is used here."""

    _owner: Owner | None

    def _close_for_cancelled(self) -> None: ...


def end_loop(stream: Owned) -> None:
    """Close the stream if its loop, which ends now, is left because its task is cancelled."""
    owner = stream._owner  # noqa: SLF001 - a part of the stream
    task = None if owner is None else owner.task()
    if task is not None and task.cancelling() and running_task() is task:
        stream._close_for_cancelled()  # noqa: SLF001 - a part of the stream


def cancelled_error() -> BaseException:
    """Return the error that observers get for a stream whose reader was cancelled."""
    from asyncio import CancelledError  # noqa: PLC0415 - importing the package stays light

    return CancelledError()


def running_task() -> Task[Any] | None:
    """Return the running task; None outside of a task, as when a coroutine is driven by hand."""
    from asyncio import current_task  # noqa: PLC0415 - importing the package stays light

    try:
        return current_task()
    except RuntimeError:  # no loop
        return None
