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
    """Lets one through every ``1 / rate`` seconds, in the order of asking."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.Lock()

    async def wait(self) -> None:
        """Wait for the turn. Cancelling it gives the turn back if nobody stands behind."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self._interval
        try:
            await asyncio.sleep(turn - time.monotonic())
        except asyncio.CancelledError:
            with self._lock:
                if self._next == turn + self._interval:
                    self._next = turn
            raise
