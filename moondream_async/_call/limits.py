"""How many requests may be open at once, and how fast new ones may start.

Both limits belong to the client and hold for all its event loops together, in
whichever threads they run. The primitives of asyncio and anyio know one loop
only; hence these two. A lock guards a few lines of bookkeeping and is never
held while anything waits. Its own thread can take it again: the garbage
collector runs when it likes, also within those lines, and what it finds may be
a stream, which gives its place back.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict


class _Turn:
    """Somebody's place in a line."""

    __slots__ = ("_future", "_loop", "given")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        self.given = False
        """Whether it is out of the line and has what it waited for, awake or not."""

    @property
    def is_void(self) -> bool:
        """Whether nobody waits any more, since the loop was closed."""
        return self._loop.is_closed()

    async def come(self) -> None:
        """Wait to be called."""
        await self._future

    def call(self) -> bool:
        """Wake who waits, from any thread; return False if nobody will wake."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


# A queue that can be left from the middle, at once however long it is.
_Line = OrderedDict[_Turn, None]


class Places:
    """A number of places, handed out in the order of asking."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total  # 0 while anybody waits
        self._lock = threading.RLock()
        self._line: _Line = OrderedDict()

    @property
    def taken(self) -> int:
        """How many places are in use."""
        return self.total - self._free

    @property
    def waiting(self) -> int:
        """How many calls stand in line."""
        return len(self._line)

    def take_at_once(self) -> bool:
        """Take a place if one is free; nobody can be in line then."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    async def take(self) -> bool:
        """Take a place; return whether it had to be waited for.

        Cancelling it leaves the line; a place that was given in the same moment
        goes to the next.
        """
        if self.take_at_once():
            return False
        turn = _Turn()
        with self._lock:
            if self._free:  # since then, by another thread
                self._free -= 1
                return False
            self._line[turn] = None
        try:
            await turn.come()
        except BaseException:  # GeneratorExit, too, where a loop was closed under its tasks
            if self._has_left(turn):
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
                turn, _ = self._line.popitem(last=False)
                turn.given = True
            if turn.call() or not self._has_left(turn):
                return

    def _has_left(self, turn: _Turn) -> bool:
        """Forget a turn; return whether it had been given a place, which is free now."""
        with self._lock:
            self._line.pop(turn, None)
            given, turn.given = turn.given, False
            return given


class Pace:
    """Lets one through at a time, at least ``1 / rate`` seconds after the one before.

    So no stretch of time, wherever it begins, sees more than the rate. Those who wait
    stand in line in the order of asking; only the first of them has a timer.
    """

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.RLock()
        self._line: _Line = OrderedDict()  # whose first is the one at the front

    async def wait(self) -> None:
        """Wait for the turn. Cancelling it leaves the line, and costs nobody anything."""
        turn = _Turn()
        with self._lock:
            self._line[turn] = None
            front = next(iter(self._line))
        try:
            if front is not turn:
                if front.is_void:
                    self._call_front()
                await turn.come()
            delay = self._next - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            self._next = max(time.monotonic(), self._next) + self._interval
        finally:
            with self._lock:
                was_front = next(iter(self._line), None) is turn
                self._line.pop(turn, None)
            if was_front:
                self._call_front()

    def _call_front(self) -> None:
        """Wake the first in line whose loop is still there."""
        with self._lock:
            while self._line and not next(iter(self._line)).call():
                self._line.popitem(last=False)
