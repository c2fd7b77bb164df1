"""How many requests may be open at once, and how fast new ones may start.

Both limits belong to the client and hold for all its event loops together, in
whichever threads they run. The primitives of asyncio and anyio know one loop
only; hence these two. A lock guards a few lines of bookkeeping and is never
held while anything waits.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque


class Places:
    """A number of places, handed out in the order of asking."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total
        self._lock = threading.Lock()
        self._line: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        """How many places are in use."""
        return self.total - self._free

    @property
    def waiting(self) -> int:
        """How many calls stand in line."""
        return len(self._line)

    async def take(self) -> bool:
        """Take a place; return whether it had to be waited for.

        Cancelling it leaves the line; a place that was granted in the same moment
        goes to the next.
        """
        with self._lock:
            if self._free and not self._line:
                self._free -= 1
                return False
            turn = asyncio.get_running_loop().create_future()
            self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            with self._lock:
                if turn in self._line:
                    self._line.remove(turn)
            if turn.done() and not turn.cancelled():
                self.give_back()
            raise
        return True

    def give_back(self) -> None:
        """Give the place to the next in line; from any thread."""
        while True:
            with self._lock:
                if not self._line:
                    self._free += 1
                    return
                turn = self._line.popleft()
            try:
                turn.get_loop().call_soon_threadsafe(self._grant, turn)
            except RuntimeError:  # its loop is closed
                continue
            return

    def _grant(self, turn: asyncio.Future[None]) -> None:
        if turn.done():  # cancelled meanwhile
            self.give_back()
        else:
            turn.set_result(None)


class Pace:
    """Lets one through at a time, at least ``1 / rate`` seconds after the one before.

    So no stretch of time, wherever it begins, sees more than the rate. Those who wait
    stand in line in the order of asking; only the first of them has a timer.
    """

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.Lock()
        self._line: deque[asyncio.Future[None]] = deque()  # whose first is the one at the front

    async def wait(self) -> None:
        """Wait for the turn. Cancelling it leaves the line, and costs nobody anything."""
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        with self._lock:
            while self._line and self._line[0].get_loop().is_closed():
                self._line.popleft()
            self._line.append(turn)
            first = self._line[0] is turn
        try:
            if not first:
                await turn
            delay = self._next - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            self._next = max(time.monotonic(), self._next) + self._interval
        finally:
            self._leave(turn)

    def _leave(self, turn: asyncio.Future[None]) -> None:
        with self._lock:
            was_first = bool(self._line) and self._line[0] is turn
            if turn in self._line:
                self._line.remove(turn)
            while was_first and self._line:
                follower = self._line[0]
                try:
                    follower.get_loop().call_soon_threadsafe(_call_forward, follower)
                except RuntimeError:  # its loop is closed
                    self._line.popleft()
                    continue
                return


def _call_forward(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
