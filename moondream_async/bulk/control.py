"""How many requests to have open, and how fast to start new ones: arithmetic only.

Answers and errors go in, each with its time; a number of requests and a number of seconds come
out. There is no clock in this module.

There are two limits, since servers are overloaded in two ways. A server that slows down, fails or
does not answer has too many requests open: `limit` falls. A server that answers 429 counts
requests over time: from then on `rate` is kept, which falls to the rate that the server accepts.
Both limits work like TCP's congestion control: they grow by a step while requests succeed, and
fall by a factor when one fails.
"""

from __future__ import annotations

from collections import deque

from moondream_async._call.retry import LONGEST_RETRY_AFTER

START = 4
"""How many requests may be open at first."""
LEAST = 1

FALL = 0.5  # factor of the limit when the server fails, as in TCP
SLOWING = 0.8  # factor of the limit when the server only gets slower
SLOW = 3.0
"""How many times the best time an answer may take before the server counts as slow.

A server that works on several pictures at once needs more time for each, and still does more
pictures in total: twice the time is no sign of trouble.
"""
ROUND = 8
"""The least number of answers whose times are averaged, since pictures differ."""
FORGET = 1.01
"""The factor by which the best time grows with each round, so that it is forgotten slowly."""

WINDOW = 0.25
"""Seconds over which accepted requests are counted for the first rate."""
FIRST_RATE = 1.0  # requests a second, at least
SEARCH = 1.0
"""What each request adds to the rate until the server's limit is found: the rate doubles in
less than a second."""
STEP = 0.006
"""The part of the rate that each request adds from then on. A refusal takes away about seven
times as much, so the rate stays level with one refusal in seven requests, and does not fall
forever if a server refuses at random."""
LEAST_RATE = 0.2
PATIENCE = 15.0
"""Seconds without a refusal after which the step doubles every second: the server now seems to
allow more."""
LEAST_FALL = 0.04
"""The part of the rate that a first refusal takes away; each further one in a row takes twice as
much, up to `FALL`."""


class Control:
    """Finds how many requests a server takes.

    >>> control = Control(100)
    >>> control.limit
    4
    >>> for moment in range(4):
    ...     control.succeeded(moment, 0.5, full=True)
    >>> control.limit
    8
    >>> control.overloaded(5.0, sent_at=4.5)
    >>> control.limit
    4

    Args:
        most: The highest that `limit` may be.
    """

    def __init__(self, most: int) -> None:
        self.rate: float | None = None
        """Requests a second; None while the server has refused none."""
        self.accepted_at = float("-inf")
        """When the server last accepted a request."""
        self.paused_until = float("-inf")
        """The end of the pause that the server asked for."""
        self.refusals = 0
        """How many refusals came since the server last accepted a request."""
        self._most = most
        self._limit = float(min(START, most))
        self._searching_limit = True
        self._searching_rate = True
        self._fell_at = float("-inf")
        self._rate_fell_at = float("-inf")
        self._next_at = float("-inf")
        self._accepted: deque[float] = deque()  # times of answers, while there is no rate
        self._refused = 0  # falls of the rate in a row
        self._times: list[float] = []
        self._best = float("inf")

    @property
    def limit(self) -> int:
        """How many requests may be open."""
        return int(self._limit)

    def delay(self, now: float) -> float:
        """Return the seconds until the next request may start; 0 if it may now."""
        return max(0.0, self._next_at - now)

    def started(self, now: float) -> None:
        """A request was sent."""
        if self.rate is None:
            return
        interval = 1 / self.rate
        if now - self._next_at < interval:  # else the rate does not limit the requests
            calm = now - self._rate_fell_at - PATIENCE
            step = self.rate * STEP * 2 ** min(max(calm, 0.0), 10.0)
            self.rate += SEARCH if self._searching_rate else min(step, SEARCH)
        # Time that was not used is lost, except for a quarter of the interval: timers are late by
        # a little, and would else lower the rate.
        self._next_at = max(self._next_at, now - interval / 4) + interval

    def succeeded(self, now: float, seconds: float, *, full: bool) -> None:
        """An answer came `seconds` after its request.

        `full` tells whether all requests that `limit` allows were open; else it need not grow.
        """
        self.took(now)
        self._times.append(seconds)
        slow = False
        if len(self._times) >= max(ROUND, self.limit):
            mean = sum(self._times) / len(self._times)
            self._times.clear()
            self._best = min(self._best * FORGET, mean)
            slow = mean > SLOW * self._best
        if slow:
            self._searching_limit = False
            self._limit = max(float(min(START, self._most)), self._limit * SLOWING)
        elif full:
            step = 1.0 if self._searching_limit else 1 / self._limit
            self._limit = min(float(self._most), self._limit + step)

    def took(self, now: float) -> None:
        """The server accepted a request, even if it then failed."""
        self.accepted_at = now
        self.refusals = 0
        self._refused = 0
        if self.rate is None:
            self._accepted.append(now)
            while self._accepted[0] < now - WINDOW:
                self._accepted.popleft()

    def overloaded(self, now: float, *, sent_at: float) -> None:
        """A request failed as in an overload: by status 503, a time limit, a lost connection.

        A request that was sent before the limit last fell changes nothing.
        """
        if sent_at < self._fell_at:
            return
        self._fell_at = now
        self._searching_limit = False
        self._limit = max(float(LEAST), self._limit * FALL)

    def refused(self, now: float, *, sent_at: float, retry_after: float | None = None) -> None:
        """The server answered 429; with `retry_after`, no request starts for so many seconds.

        The pause has the same upper limit as in other calls. A request that was sent before the
        rate last fell does not change the rate.
        """
        self.refusals += 1
        if retry_after is not None:
            self.paused_until = max(self.paused_until, now + min(retry_after, LONGEST_RETRY_AFTER))
            self._next_at = max(self._next_at, self.paused_until)
        if sent_at < self._rate_fell_at:
            return
        if self.rate is None:
            self.rate = max(FIRST_RATE, sum(at > now - WINDOW for at in self._accepted) / WINDOW)
            self._accepted.clear()
        else:
            self._searching_rate = False
            fall = min(LEAST_FALL * 2**self._refused, 1 - FALL)
            self.rate = max(LEAST_RATE, self.rate * (1 - fall))
            self._refused = min(self._refused + 1, 10)
        self._rate_fell_at = now
        self._next_at = max(self._next_at, now + 1 / self.rate)
