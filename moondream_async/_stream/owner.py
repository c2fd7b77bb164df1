"""Who a stream belongs to: the task that reads it.

Code that reads with `async for` can be cancelled while it waits for text, and while it does
something with the text that it has. The stream sees the first by itself. The second is
seen here: by the task, when it ends cancelled, and by the loop, when it is left while
the task is being cancelled, as by ``asyncio.timeout`` or a cancel scope.

The owner keeps neither the task nor the stream alive, and the task keeps an owner no longer
than it owns the stream: a task may live long, and read many streams.
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
        """Close the stream if `task`, which is over, was cancelled."""
        stream = self._stream()
        if stream is not None and task.cancelled():
            stream._close_for_cancelled()  # noqa: SLF001 - a part of the stream

    def leave(self) -> None:
        """Own the stream no more."""
        task = self.task()
        if task is not None:
            task.remove_done_callback(self)


class Owned(Protocol):
    """What of a stream is used here."""

    _owner: Owner | None

    def _close_for_cancelled(self) -> None: ...


def end_loop(stream: Owned) -> None:
    """Close the stream if the loop over it that ends here is left by a task that is cancelled."""
    owner = stream._owner  # noqa: SLF001 - a part of the stream
    task = None if owner is None else owner.task()
    if task is not None and task.cancelling() and running_task() is task:
        stream._close_for_cancelled()  # noqa: SLF001 - a part of the stream


def cancelled_error() -> BaseException:
    """Return what is told to observers of a stream whose reader was cancelled."""
    from asyncio import CancelledError  # noqa: PLC0415 - importing the package stays light

    return CancelledError()


def running_task() -> Task[Any] | None:
    """Return the task that runs; None where there is none, as under another driver."""
    from asyncio import current_task  # noqa: PLC0415 - importing the package stays light

    try:
        return current_task()
    except RuntimeError:  # no loop
        return None
