"""The time limits of one call, over all its attempts; and its end when the client is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from moondream_async.errors import APITimeoutError, ClientClosedError, MoondreamError, Phase

if TYPE_CHECKING:
    from types import TracebackType

    from moondream_async._transport.pools import Pool
    from moondream_async.types import Timeout

    from .limits import Semaphore

_NEVER = float("inf")
_LOOKS = 8
"""Times in a limit that it is asked whether what is waited for has come nearer."""
_ROUNDS = 2
"""Times that the loop goes round after a limit ran out: when the process had stood still, what
arrived meanwhile reaches the call in these."""


class Deadline:
    """Cancels the block that it is entered for when a limit runs out, or the client is closed.

    It is entered for each step of a call, one after the other; what follows a block that was
    ended by it raises `error`. There is one timer at most, and it is moved only to an earlier
    time: when it goes off too early, it is set anew.
    """

    __slots__ = (
        "_at",
        "_cancelling",
        "_closed",
        "_expired",
        "_limit",
        "_loop",
        "_moving",
        "_phase",
        "_phase_at",
        "_rings_at",
        "_rounds",
        "_slots",
        "_task",
        "_timeout",
        "_timer",
        "_total_at",
        "pool",
        "sent_at",
    )

    def __init__(
        self, pool: Pool, timeout: Timeout, total_at: float | None, slots: Semaphore
    ) -> None:
        self._loop = pool.loop
        self.pool = pool
        """Where the call sends its requests."""
        self._slots = slots
        self._timeout = timeout
        self._total_at = _NEVER if total_at is None else total_at
        self._phase: Phase = "total"
        self._moving: Callable[[], bool] | None = None
        self._limit = self._phase_at = _NEVER
        self._at = _NEVER
        self._timer: asyncio.Handle | None = None
        self._rings_at = _NEVER  # the timer; not all loops' timers tell it, as qasync's do not
        self._rounds = 0
        self._expired = False
        self._closed = False
        self.sent_at = 0.0
        """When the request, or its last byte, was on its way; on the loop's clock."""

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - aiohttp needs one, too
        self._task = task
        self._cancelling = task.cancelling()
        self._expired = False
        self.enter(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._at = _NEVER
        if not (self._expired or self._closed):
            return False
        # If others have cancelled the task as well, it goes on being cancelled.
        return self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    def begin_total(self) -> None:
        """Have `Timeout.total` count from now on."""
        if self._timeout.total is not None:
            self._total_at = self._loop.time() + self._timeout.total
            self.enter(None)

    def cancel(self) -> None:
        """Watch no more: the call is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # whose method leads back here

    def enter(self, phase: Phase | None, moving: Callable[[], bool] | None = None) -> None:
        """Start the limit of a phase; None has none but the total.

        Where `moving` is given, the limit starts anew as often as `moving` says that what is
        waited for has come nearer since it was asked for the last time.
        """
        limit = None if phase is None else getattr(self._timeout, phase)
        now = self._loop.time()
        self._limit = _NEVER if limit is None else limit
        self._moving = None if limit is None else moving
        self._phase = "total" if phase is None else phase
        self._phase_at = now + self._limit
        self._run_until(self._next_look(now))

    def _next_look(self, now: float) -> float:
        at = min(self._phase_at, self._total_at)
        return at if self._moving is None else min(at, now + self._limit / _LOOKS)

    def sending(self, moved: Callable[[], bool]) -> None:
        """The request goes out; its limit starts anew as long as any of it has `moved`."""
        self.sent_at = self._loop.time()
        self.enter("first_event", moved)

    def sent(self) -> None:
        """The last byte is on its way: the server has its time from now on."""
        self.sent_at = self._loop.time()
        self.enter("first_event")

    @property
    def left(self) -> float:
        """Seconds until the present limit runs out."""
        return min(self._phase_at, self._total_at) - self._loop.time()

    @property
    def left_in_total(self) -> float:
        """Seconds until `Timeout.total` runs out."""
        return self._total_at - self._loop.time()

    def close(self) -> None:
        """End the call, since the client is closed; in its loop."""
        if not (self._closed or self._expired):
            self._closed = True
            self._task.cancel()

    def error(self) -> MoondreamError:
        """Return the error for what ended the block."""
        if self._closed:
            return ClientClosedError("The client was closed during the call")
        phase = self._phase
        limit = f"within {getattr(self._timeout, phase):g} seconds (Timeout.{phase})"
        message = {
            "pool": f"No connection became free {limit}: {self._slots.taken} streams or calls are "
            f"open, of max_connections={self._slots.total}",
            "connect": f"Could not connect {limit}",
            "first_event": f"The answer did not begin {limit}",
            "total": f"The call was not complete {limit}",
        }
        if phase == "first_event" and self._moving is not None:
            message[phase] = f"The upload stood still: nothing of the request went out {limit}"
        return APITimeoutError(message[phase], phase=phase)

    def _run_until(self, at: float) -> None:
        self._at = at
        self._rounds = 0
        if at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._ring)
            self._rings_at = at

    def _ring(self) -> None:
        self._timer = None
        self._rings_at = _NEVER
        if self._expired or self._closed or self._at == _NEVER:
            return
        now = self._loop.time()
        if now >= self._at and self._moving is not None:
            if self._moving():
                self._phase_at = now + self._limit
            self._at = self._next_look(now)
        if now < self._at:
            self._run_until(self._at)
        elif self._rounds < _ROUNDS:
            self._rounds += 1
            self._timer = self._loop.call_at(0, self._ring)
            self._rings_at = 0  # enter() sets no other timer before that
        else:
            if self._total_at <= self._phase_at:
                self._phase = "total"
            self._expired = True
            self._task.cancel()
