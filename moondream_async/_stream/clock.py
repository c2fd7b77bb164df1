"""Deadlines that cost little to put off, and the one of a stream's reader."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from moondream_async.errors import Phase
from moondream_async.types import Timeout

if TYPE_CHECKING:
    import asyncio

NEVER = float("inf")

_ROUNDS = 4
"""Rounds of the loop between the deadline and its expiring.

A loop that was held up, or whose process was stopped, finds the time over and the bytes that
came meanwhile at once. One round reads them from the socket and one more gives them to whoever
waits; asyncio, after a stop, and uvloop look at the timers first and at the sockets after.
"""


class Deadline:
    """A point in time that may be moved with every event: there is one timer at most.

    The timer is set anew only for an earlier time. When it goes off too early, it is set for
    the rest. A subclass says in `expired` what happens then.
    """

    __slots__ = ("_at", "_loop", "_rings_at", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._at = NEVER
        self._timer: asyncio.Handle | None = None
        self._rings_at = NEVER  # the timer; not all loops' timers tell it, as qasync's do not

    def expired(self) -> None:
        """The time has come, and the deadline was not moved; called once for that time."""
        raise NotImplementedError

    def move(self, at: float) -> None:
        """Set the deadline, by the loop's clock; `NEVER` is none."""
        self._at = at
        if at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._ring)
            self._rings_at = at

    def cancel(self) -> None:
        """Watch no more."""
        self._at = NEVER
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # whose method leads back here
            self._rings_at = NEVER

    def _ring(self, rounds: int = _ROUNDS) -> None:
        self._timer = None
        self._rings_at = NEVER
        if self._loop.time() < self._at:
            if self._at < NEVER:
                self.move(self._at)
        elif rounds:
            self._timer = self._loop.call_soon(partial(self._ring, rounds - 1))
            self._rings_at = 0.0  # move() sets no other timer before that
        else:
            self._at = NEVER
            self.expired()


class Closable(Protocol):
    """What a clock closes when the time is up."""

    def close(self) -> None:
        """Wake whoever waits for it, with an error."""


class Clock(Deadline):
    """Watches one source: closes it when it has kept a reader waiting for too long.

    The time counts only while somebody waits. Bytes that complete no event change nothing.
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
        """Somebody begins to wait for the next event."""
        at = self._loop.time() + self._limit
        self._runs = self._phase
        if at >= self._total_at:
            self._runs = "total"
            at = self._total_at
        self.move(at)

    def stop(self) -> None:
        """The next event is there; the ones that follow are waited for less long."""
        self._at = NEVER
        self._phase = "idle"
        self._limit = self._idle

    def expired(self) -> None:
        """Close the source, so that who waits for it is woken."""
        self.expired_phase = self._runs
        self._source.close()


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop."""
    from asyncio import get_running_loop  # noqa: PLC0415 - importing the package stays light

    return get_running_loop()
