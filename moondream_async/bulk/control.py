"""How many requests to have open, and how fast to start new ones: arithmetic only.

Answers and failures go in, each with the time at which it came; a number of
places and a number of seconds come out. There is no clock in here.

Two numbers, since servers say in two ways that it is too much. One that grows
slow, fails or does not answer has too many requests open: `limit` falls. One
that answers 429 counts requests over time: then `rate` is kept, and falls to
what the server was seen to take. Both are of the kind that made TCP share its
lines: grow by a step while all goes well, fall by a factor when it doesn't.
"""

from __future__ import annotations

from collections import deque

from moondream_async._call.retry import LONGEST_RETRY_AFTER

START = 4
"""How many requests may be open at first."""
LEAST = 1

FALL = 0.5  # of the limit, when the server fails; TCP's figure
SLOWING = 0.8  # of the limit, when the server only gets slower
SLOW = 3.0
"""How many times longer than at its best an answer may take.

A server that works on several pictures at once takes longer for each, and does
more of them: twice as long is no sign of trouble.
"""
ROUND = 8
"""Answers, at least, whose time is averaged: one picture takes longer than another."""
FORGET = 1.01
"""By how much the best time grows with each round, so that a good minute is forgotten."""

WINDOW = 0.25
"""Seconds over which accepted requests are counted, to have a rate to begin with."""
FIRST_RATE = 1.0  # requests a second, at least
SEARCH = 1.0
"""What each start adds to the rate while it looks for the server's limit: it doubles in less
than a second."""
STEP = 0.006
"""What each start adds from then on, as a part of the rate. It falls by some seven times that,
so that a seventh of the requests may be refused: servers that refuse at random, whatever the
rate, are not met with ever lower ones."""
LEAST_RATE = 0.2
PATIENCE = 15.0
"""Seconds without a refusal after which the step doubles every second: what the server
allowed then is not what it allows now."""
LEAST_FALL = 0.04
"""Of the rate, for a first refusal; twice as much for each more in a row, up to `FALL`."""


class Control:
    """Finds how much a server takes.

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
        """When the server last took a request."""
        self.paused_until = float("-inf")
        """Until when the server asked that nothing starts."""
        self.refusals = 0
        """How many in a row, since the server last took a request."""
        self._most = most
        self._limit = float(min(START, most))
        self._searching_limit = True
        self._searching_rate = True
        self._fell_at = float("-inf")
        self._rate_fell_at = float("-inf")
        self._next_at = float("-inf")
        self._accepted: deque[float] = deque()  # when; while there is no rate
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
        if now - self._next_at < interval:  # else the rate isn't what holds the requests up
            calm = now - self._rate_fell_at - PATIENCE
            step = self.rate * STEP * 2 ** min(max(calm, 0.0), 10.0)
            self.rate += SEARCH if self._searching_rate else min(step, SEARCH)
        # What could have been sent earlier and was not is no credit, but for a moment's
        # lateness: else it would be the timers that set the rate.
        self._next_at = max(self._next_at, now - interval / 4) + interval

    def succeeded(self, now: float, seconds: float, *, full: bool) -> None:
        """An answer came `seconds` after it was asked for.

        `full` tells that all places were taken: more are of use to nobody else.
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
        """The server took a request, whatever it made of it."""
        self.accepted_at = now
        self.refusals = 0
        self._refused = 0
        if self.rate is None:
            self._accepted.append(now)
            while self._accepted[0] < now - WINDOW:
                self._accepted.popleft()

    def overloaded(self, now: float, *, sent_at: float) -> None:
        """A request failed as they do when a server has too many: 503, a time limit, no line.

        What was sent before the limit last fell says nothing new.
        """
        if sent_at < self._fell_at:
            return
        self._fell_at = now
        self._searching_limit = False
        self._limit = max(float(LEAST), self._limit * FALL)

    def refused(self, now: float, *, sent_at: float, retry_after: float | None = None) -> None:
        """The server answered 429; with `retry_after`, nothing is to start for so many seconds.

        It is waited for as long as in other calls at most.

        What was sent before the rate last fell says nothing new.
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
