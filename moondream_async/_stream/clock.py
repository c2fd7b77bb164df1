"""Deadlines that are cheap to move, and the deadline of a stream's reader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from moondream_async.errors import Phase
from moondream_async.types import Timeout

if TYPE_CHECKING:
    import asyncio

NEVER = float("inf")

_ROUNDS = 4
"""Rounds of the event loop between the time of a deadline and its expiry.

If the loop was blocked, or its process stopped, it finds at once that the time is over and that
bytes have come meanwhile. One round reads them from the socket, and the next gives them to the
reader; uvloop, and asyncio after a stop, run timers before they read sockets.
"""


class Deadline:
    """A point in time that may be moved with every event, with one timer at most.

    `move` to a later time leaves the timer as it is: a timer that goes off too early is set
    again for the rest. A subclass defines `expired`.
    """

    __slots__ = ("_at", "_loop", "_rings_at", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._at = NEVER
        self._timer: asyncio.Handle | None = None
        self._rings_at = NEVER  # when `_timer` goes off: the timers of qasync have no `when()`

    def expired(self) -> None:
        """Called once when the time has come and the deadline was not moved."""
        raise NotImplementedError

    def move(self, at: float) -> None:
        """Set the deadline, on the loop's clock; `NEVER` is no deadline."""
        self._at = at
        if at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._ring)
            self._rings_at = at

    def cancel(self) -> None:
        """Remove the deadline and its timer."""
        self._at = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # it holds this object
            self._rings_at = NEVER

    def _ring(self, rounds: int = _ROUNDS) -> None:
        self._timer = None
        self._rings_at = NEVER
        if self._loop.time() < self._at:
            if self._at < NEVER:
                self.move(self._at)
        elif rounds:
            self._timer = self._loop.call_soon(partial(self._ring, rounds - 1))
            self._rings_at = 0.0  # so that `move` sets no other timer meanwhile
        else:
            self._at = NEVER
            self.expired()


class Closable(Protocol):
    """What a clock closes when the time is over."""

    def close(self) -> None:
        """Close it; a task that waits for it gets an error."""


class Clock(Deadline):
    """Closes a stream's source when a reader has waited too long for an event.

    The time runs only while a reader waits. Bytes that complete no event do not restart it.
    """

    __slots__ = ("_idle", "_limit", "_phase", "_runs", "_source", "_total_at", "expired_phase")

    def __init__(
        self, source: Closable, timeout: Timeout, total_at: float | None, waited: float
    ) -> None:
        super().__init__(running_loop())
        self.expired_phase: Phase | None = None
        """The limit that ran out."""
        self._source = source
        self._phase: Phase = "first_event"
        self._limit = NEVER if timeout.first_event is None else timeout.first_event - waited
        self._idle = NEVER if timeout.idle is None else timeout.idle
        self._total_at = NEVER if total_at is None else total_at
        self._runs: Phase = "total"

    def start(self) -> None:
        """A reader begins to wait for the next event."""
        at = self._loop.time() + self._limit
        self._runs = self._phase
        if at >= self._total_at:
            self._runs = "total"
            at = self._total_at
        self.move(at)

    def stop(self) -> None:
        """The next event has come; from now on the limit is `Timeout.idle`."""
        self._at = NEVER
        self._phase = "idle"
        self._limit = self._idle

    def expired(self) -> None:
        """Close the source, which wakes its reader with an error."""
        self.expired_phase = self._runs
        self._source.close()


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop."""
    from asyncio import get_running_loop  # noqa: PLC0415 - importing the package stays light

    return get_running_loop()
