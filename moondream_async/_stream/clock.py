"""The clock of a stream: how long its readers have waited for the server."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from moondream_async.errors import Phase
from moondream_async.types import Timeout

if TYPE_CHECKING:
    import asyncio

_NEVER = float("inf")


class Closable(Protocol):
    """What a clock closes when the time is up."""

    def close(self) -> None:
        """Wake whoever waits for it, with an error."""


class Clock:
    """Watches one source: closes it when it has kept a reader waiting for too long.

    The time counts only while somebody waits, and adds up until an event comes;
    bytes that complete no event change nothing. There is one timer at most, and
    it is not moved with every event: when it goes off too early, it is set anew.
    """

    __slots__ = (
        "_deadline",
        "_idle",
        "_limit",
        "_loop",
        "_phase",
        "_rings_at",
        "_source",
        "_started",
        "_timer",
        "_total_at",
        "_waited",
        "expired",
    )

    def __init__(
        self, source: Closable, timeout: Timeout, total_at: float | None, waited: float
    ) -> None:
        self.expired: Phase | None = None
        """The limit that ran out."""
        self._source = source
        self._loop = running_loop()
        self._phase: Phase = "first_event"
        self._limit = _NEVER if timeout.first_event is None else timeout.first_event
        self._idle = _NEVER if timeout.idle is None else timeout.idle
        self._total_at = _NEVER if total_at is None else total_at
        self._waited = waited
        self._started = 0.0
        self._deadline = _NEVER  # while nobody waits
        self._timer: asyncio.Handle | None = None
        self._rings_at = _NEVER  # the timer; not all loops' timers tell it, as qasync's do not

    def start(self) -> None:
        """Somebody begins to wait."""
        self._started = now = self._loop.time()
        self._deadline = min(now + self._limit - self._waited, self._total_at)
        if self._deadline < self._rings_at:
            self._set(self._deadline)

    def stop(self, *, progress: bool) -> None:
        """The wait is over, with an event or without."""
        self._deadline = _NEVER
        if progress:
            self._waited = 0.0
            if self._phase != "idle":
                self._phase = "idle"
                self._limit = self._idle
        else:
            self._waited += self._loop.time() - self._started

    def cancel(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._rings_at = _NEVER

    def _set(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._ring)
        self._rings_at = when

    def _ring(self, *, again: bool = False) -> None:
        self._timer = None
        self._rings_at = _NEVER
        if self._deadline == _NEVER:
            return
        if self._loop.time() < self._deadline:
            self._set(self._deadline)
        elif not again:
            # When the loop has been held up, what arrived meanwhile reaches the reader in
            # this very round. At 0: start() sets no other timer before that.
            self._timer = self._loop.call_at(0, partial(self._ring, again=True))
            self._rings_at = 0
        else:
            self.expired = "total" if self._deadline == self._total_at else self._phase
            self._source.close()


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running event loop."""
    from asyncio import get_running_loop  # noqa: PLC0415 - importing the package stays light

    return get_running_loop()
