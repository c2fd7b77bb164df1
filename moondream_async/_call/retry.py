"""What to retry and how long to wait first: arithmetic only.

There is no clock and no randomness in this module; the client brings both. An error goes in; a
number of seconds, or None for no retry, comes out.
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
"""Statuses to retry. Skills only read a picture, so a second POST changes nothing."""

_REFUSALS = frozenset({425, 429})

FIRST_DELAY = 0.5  # seconds; the official SDK's figure, as is the doubling
LONGEST_DELAY = 30.0
LONGEST_RETRY_AFTER = 60.0
"""The longest wait in seconds that ``Retry-After`` can ask for."""

BUDGET = 500
"""How much a client may spend on retries while none of its calls succeeds."""
RETRY_COST = 5
"""The price of one retry: `BUDGET` pays for a hundred in a row that do not help."""


def is_worth_retrying(error: MoondreamError) -> bool:
    """Tell whether the same request can succeed when it is sent again.

    It can after a connection that could not be made or broke, after one of `STATUSES`, and
    after Station's ``{"status": "rejected"}`` (its queue was full), which comes with status 200.
    It can't after Station's ``timeout``: the worker is still busy with the job.
    """
    if isinstance(error, APITimeoutError):
        return error.phase == "connect"
    if isinstance(error, APIStatusError):
        rejected = isinstance(error.body, dict) and error.body.get("status") == "rejected"
        return rejected or error.status in STATUSES
    return isinstance(error, APIConnectionError) and not error.permanent


def was_refused(error: MoondreamError) -> bool:
    """Tell whether the server refused the request before it began to process it."""
    return isinstance(error, APIStatusError) and error.status in _REFUSALS


def is_refusal(error: MoondreamError) -> bool:
    """Tell whether the server is too busy: 429, or Station's full queue, with status 200."""
    if not isinstance(error, APIStatusError):
        return False
    rejected = isinstance(error.body, dict) and error.body.get("status") == "rejected"
    return error.status == 429 or rejected


def backoff(attempt: int, jitter: float, retry_after: float | None = None) -> float:
    """Return the seconds to wait after the failed attempt number `attempt` (from 0).

    The delay is exponential with full jitter: a random part, `jitter` in 0-1, of a doubling
    delay, so that clients that failed together do not retry together. The server's
    ``Retry-After`` comes first, up to `LONGEST_RETRY_AFTER`.

    >>> backoff(0, 1.0), backoff(2, 0.5), backoff(99, 1.0)
    (0.5, 1.0, 30.0)
    >>> backoff(0, 0.1, retry_after=7), backoff(0, 0.1, retry_after=86400)
    (7, 60.0)
    """
    if retry_after is not None:
        return min(retry_after, LONGEST_RETRY_AFTER)
    return jitter * min(FIRST_DELAY * 2.0 ** min(attempt, 16), LONGEST_DELAY)


class Retries(Protocol):
    """Decides whether and when a failed call is sent again; each call has its own."""

    most: int
    """The highest number of retries."""

    def delay(self, error: MoondreamError, *, jitter: float, left: float) -> float | None:
        """Return the seconds until the next attempt; None for no further attempt.

        Args:
            error: The error of the last attempt.
            jitter: A random number in 0-1.
            left: Seconds until `Timeout.total` runs out.
        """

    def succeeded(self) -> None:
        """The call has its answer."""


class CallRetries:
    """The retries of a single call: up to `most`, while the client's budget lasts."""

    def __init__(self, most: int, budget: Budget) -> None:
        self.most = most
        self._budget = budget
        self._failures = 0

    def delay(self, error: MoondreamError, *, jitter: float, left: float) -> float | None:
        """Return the seconds until the next attempt; None for no further attempt."""
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
    """Stops retries when most calls of a client fail, so as not to overload the server further.

    Each retry costs `RETRY_COST`. A call that succeeds after a retry earns that back, and a call
    that succeeds at once earns 1. While few calls fail, the budget stays full. When nearly all
    calls fail, it is soon spent, and errors are raised without retries. The idea and the numbers
    come from the standard retry mode of the AWS SDKs.

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
        """Pay for a retry; return False if too little is left."""
        with self._lock:
            if self._left < RETRY_COST:
                return False
            self._left -= RETRY_COST
            return True

    def succeeded(self, *, after_retry: bool) -> None:
        """Add what a successful call earns."""
        if self._left == self._size:  # nearly always
            return
        with self._lock:
            self._left = min(self._size, self._left + (RETRY_COST if after_retry else 1))
