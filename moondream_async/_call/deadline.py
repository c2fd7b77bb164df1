"""The time limits of one call, over all its attempts; and its end when the client is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from moondream_async._stream.clock import NEVER, Deadline
from moondream_async.errors import APITimeoutError, ClientClosedError, MoondreamError, Phase

if TYPE_CHECKING:
    from types import TracebackType

    from moondream_async._transport.pools import Pool
    from moondream_async.types import Timeout

    from .limits import Semaphore

_LOOKS = 8
"""How often in one limit to look whether there was progress."""


class CallDeadline(Deadline):
    """Cancels its ``with`` block when a limit runs out or the client is closed.

    A call enters it once for each attempt; the code after a block that it has cancelled raises
    `error`. One timer serves all phases.
    """

    __slots__ = (
        "_cancelling",
        "_closed",
        "_is_expired",
        "_limit",
        "_moving",
        "_phase",
        "_phase_at",
        "_slots",
        "_task",
        "_timeout",
        "_total_at",
        "pool",
        "sent_at",
    )

    def __init__(
        self, pool: Pool, timeout: Timeout, total_at: float | None, slots: Semaphore
    ) -> None:
        super().__init__(pool.loop)
        self.pool = pool
        """Where the call sends its requests."""
        self._slots = slots
        self._timeout = timeout
        self._total_at = NEVER if total_at is None else total_at
        self._phase: Phase = "total"
        self._moving: Callable[[], bool] | None = None
        self._limit = self._phase_at = NEVER
        self._is_expired = False
        self._closed = False
        self.sent_at = 0.0
        """When the request, or its last byte, was sent; on the loop's clock."""

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - aiohttp needs one, too
        self._task = task
        self._cancelling = task.cancelling()
        self._is_expired = False
        self._phase = "total"
        self._moving = None
        self._phase_at = NEVER
        if self._total_at < NEVER:
            self.move(self._total_at)
        else:
            self._at = NEVER
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._at = NEVER
        if not (self._is_expired or self._closed):
            return False
        # If other code has cancelled the task as well, the task stays cancelled.
        return self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError

    def begin_total(self) -> None:
        """Start `Timeout.total` now."""
        if self._timeout.total is not None:
            self._total_at = self._loop.time() + self._timeout.total
            self.enter(None)

    def enter(
        self,
        phase: Phase | None,
        moving: Callable[[], bool] | None = None,
        *,
        now: float | None = None,
    ) -> None:
        """Start the limit of a phase; None is no limit but the total.

        `moving` tells whether there was progress since the last time it was called; with it, the
        limit starts anew after each progress.
        """
        limit = None if phase is None else getattr(self._timeout, phase)
        if now is None:
            now = self._loop.time()
        self._limit = NEVER if limit is None else limit
        self._moving = None if limit is None else moving
        self._phase = "total" if phase is None else phase
        self._phase_at = at = now + self._limit
        if self._moving is not None:
            at = self._next_look(now)
        elif self._total_at < at:
            at = self._total_at
        if at < self._rings_at:
            self.move(at)
        else:
            self._at = at  # the timer goes off earlier, and is then set for the rest

    def _next_look(self, now: float) -> float:
        at = min(self._phase_at, self._total_at)
        return at if self._moving is None else min(at, now + self._limit / _LOOKS)

    def sending(self, moved: Callable[[], bool]) -> None:
        """The request is being sent; its limit starts anew whenever some of it has `moved`."""
        self.sent_at = now = self._loop.time()
        self.enter("first_event", moved, now=now)

    def sent(self) -> None:
        """The last byte was sent: the limit of the server's answer starts."""
        self.sent_at = now = self._loop.time()
        self.enter("first_event", now=now)

    @property
    def left(self) -> float:
        """Seconds until the present limit runs out."""
        return min(self._phase_at, self._total_at) - self._loop.time()

    @property
    def left_in_total(self) -> float:
        """Seconds until `Timeout.total` runs out."""
        return self._total_at - self._loop.time()

    def close(self) -> None:
        """End the call, since the client is closed; called in the call's loop."""
        if not (self._closed or self._is_expired):
            self._closed = True
            self._task.cancel()

    def error(self) -> MoondreamError:
        """Return the error that says why the block was cancelled."""
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

    def expired(self) -> None:
        """A limit has run out, or it is time to look for progress."""
        now = self._loop.time()
        if self._moving is not None:
            if self._moving():
                self._phase_at = now + self._limit
            at = self._next_look(now)
            if now < at:
                self.move(at)
                return
        if self._total_at <= self._phase_at:
            self._phase = "total"
        self._is_expired = True
        self._task.cancel()
