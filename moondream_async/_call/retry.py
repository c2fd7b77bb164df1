"""What to retry and how long to wait first: arithmetic only.

No clock and no randomness in here; the client brings both. A failure goes in,
a number of seconds or a plain "no" comes out.
"""

from __future__ import annotations

import threading
from typing import Protocol

from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    MoondreamError,
)

STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})
"""Worth another try: all skills only read a picture, so a second POST changes nothing."""

_REFUSALS = frozenset({425, 429})

FIRST_DELAY = 0.5  # seconds; the official SDK's figure, as is the doubling
LONGEST_DELAY = 30.0
LONGEST_RETRY_AFTER = 60.0
"""A server that asks for more is asked again after this many seconds."""

BUDGET = 500
"""What a client may spend on retries before some of its calls succeed."""
RETRY_COST = 5
"""So a hundred retries in a row that come to nothing are the last for now."""


def is_worth_retrying(error: MoondreamError) -> bool:
    """Say whether the same request can succeed when it is sent again.

    A connection that could not be made or broke, the statuses above, and
    Station's ``{"status": "rejected"}`` (its queue was full), which comes with
    status 200. Not Station's ``timeout``: its worker is still busy with the job.
    """
    if isinstance(error, APITimeoutError):
        return error.phase == "connect"
    if isinstance(error, APIStatusError):
        rejected = isinstance(error.body, dict) and error.body.get("status") == "rejected"
        return rejected or error.status in STATUSES
    return isinstance(error, APIConnectionError) and not error.permanent


def was_refused(error: MoondreamError) -> bool:
    """Say whether the server turned the request away before it began with it."""
    return isinstance(error, APIStatusError) and error.status in _REFUSALS


def is_refusal(error: MoondreamError) -> bool:
    """Tell that a server has too much to do: 429, and Station's full queue, with status 200."""
    if not isinstance(error, APIStatusError):
        return False
    rejected = isinstance(error.body, dict) and error.body.get("status") == "rejected"
    return error.status == 429 or rejected


def backoff(attempt: int, jitter: float, retry_after: float | None = None) -> float:
    """Return the seconds to wait before the try after failed try number `attempt` (from 0).

    Exponential with full jitter: a random part, `jitter` in 0-1, of a doubling
    delay, so that clients which failed together do not come back together.
    What the server asked for wins, up to `LONGEST_RETRY_AFTER`.

    >>> backoff(0, 1.0), backoff(2, 0.5), backoff(99, 1.0)
    (0.5, 1.0, 30.0)
    >>> backoff(0, 0.1, retry_after=7), backoff(0, 0.1, retry_after=86400)
    (7, 60.0)
    """
    if retry_after is not None:
        return min(retry_after, LONGEST_RETRY_AFTER)
    return jitter * min(FIRST_DELAY * 2.0 ** min(attempt, 16), LONGEST_DELAY)


class Retries(Protocol):
    """Decides whether, and when, a call that failed is sent again; one for each call."""

    most: int
    """How often at most."""

    def delay(self, error: MoondreamError, *, jitter: float, left: float) -> float | None:
        """Return the seconds until the next attempt; None if there is to be none.

        Args:
            error: How the last one failed.
            jitter: A random number in 0-1.
            left: Seconds until the time for the whole call is over.
        """

    def succeeded(self) -> None:
        """The call has its answer."""


class CallRetries:
    """The retries of a single call: so many, as long as the client's budget lasts."""

    def __init__(self, most: int, budget: Budget) -> None:
        self.most = most
        self._budget = budget
        self._failures = 0

    def delay(self, error: MoondreamError, *, jitter: float, left: float) -> float | None:
        """Return the seconds until the next attempt; None if there is to be none."""
        if self._failures >= self.most or not is_worth_retrying(error):
            return None
        retry_after = error.retry_after if isinstance(error, APIStatusError) else None
        seconds = backoff(self._failures, jitter, retry_after)
        if seconds >= left or not self._budget.take():
            return None
        self._failures += 1
        return seconds

    def succeeded(self) -> None:
        """The call has its answer."""
        self._budget.succeeded(after_retry=self._failures > 0)


class Budget:
    """Ends the retries when most of a client's calls fail, so that no storm is fed.

    Each retry is paid for; a call that succeeds after one gets its price back, and
    one that succeeds at once earns a little. While a few calls fail, the budget is
    always full. When nearly all do, it is soon spent, and errors come at once. The
    idea and the numbers are those of the AWS SDKs' standard retry mode.

    >>> budget = Budget(10)
    >>> budget.take(), budget.take(), budget.take()
    (True, True, False)
    >>> budget.succeeded(after_retry=True)
    >>> budget.take()
    True
    """

    def __init__(self, size: int = BUDGET) -> None:
        self._size = size
        self._left = size
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Pay for a retry; False if there is not enough left."""
        with self._lock:
            if self._left < RETRY_COST:
                return False
            self._left -= RETRY_COST
            return True

    def succeeded(self, *, after_retry: bool) -> None:
        """Put back what a call that succeeded is worth."""
        if self._left == self._size:  # as nearly always
            return
        with self._lock:
            self._left = min(self._size, self._left + (RETRY_COST if after_retry else 1))
