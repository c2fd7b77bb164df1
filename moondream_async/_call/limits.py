"""How many requests may be open at once, and how fast new ones may start.

Both limits belong to the client, and hold for all its event loops and threads together; the
primitives of asyncio and anyio work in one loop only. A lock guards a few lines of bookkeeping
and is never held during a wait. The same thread can take it again, since the garbage collector
may run within these lines and free a stream, which releases its connection slot.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict


class _Waiter:
    """A task of any loop that waits in a queue."""

    __slots__ = ("_future", "_loop", "served")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        self.served = False
        """Whether it was taken out of the queue and given a slot, even if it still sleeps."""

    @property
    def is_void(self) -> bool:
        """Whether the task is gone, since its loop was closed."""
        return self._loop.is_closed()

    async def wait(self) -> None:
        """Wait to be woken."""
        await self._future

    def wake(self) -> bool:
        """Wake the task, from any thread; return False if it will not wake."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


# A queue whose waiters can leave from the middle, in constant time.
_Queue = OrderedDict[_Waiter, None]


class Semaphore:
    """A number of slots, handed out in the order of asking, to any loop and thread."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = total  # 0 while a task waits
        self._lock = threading.RLock()
        self._queue: _Queue = OrderedDict()

    @property
    def taken(self) -> int:
        """How many slots are in use."""
        return self.total - self._free

    @property
    def waiting(self) -> int:
        """How many tasks wait for a slot."""
        return len(self._queue)

    def try_acquire(self) -> bool:
        """Take a slot if one is free; no task can be waiting then."""
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    async def acquire(self) -> bool:
        """Take a slot; return whether the task had to wait for it.

        Cancelling it leaves the queue; a slot that was granted in the same moment goes to the
        next waiter.
        """
        if self.try_acquire():
            return False
        waiter = _Waiter()
        with self._lock:
            if self._free:  # another thread has released a slot meanwhile
                self._free -= 1
                return False
            self._queue[waiter] = None
        try:
            await waiter.wait()
        except BaseException:  # also GeneratorExit, if the loop was closed under its tasks
            if self._has_left(waiter):
                self.release()
            raise
        return True

    def release(self) -> None:
        """Give the slot to the next waiter in the queue; from any thread."""
        while True:
            with self._lock:
                if not self._queue:
                    self._free += 1
                    return
                waiter, _ = self._queue.popitem(last=False)
                waiter.served = True
            if waiter.wake() or not self._has_left(waiter):
                return

    def _has_left(self, waiter: _Waiter) -> bool:
        """Forget a waiter; return whether it had a slot, which the caller must release."""
        with self._lock:
            self._queue.pop(waiter, None)
            served, waiter.served = waiter.served, False
            return served


class RateLimiter:
    """Lets calls pass one by one, each at least ``1 / rate`` seconds after the one before.

    So no interval of time has more calls than the rate, wherever it begins. Waiting calls pass
    in the order of asking; only the first of them has a timer.
    """

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._next = 0.0
        self._lock = threading.RLock()
        self._queue: _Queue = OrderedDict()  # the first waiter is at the front

    async def wait(self) -> None:
        """Wait until the call may pass. Cancelling leaves the queue, and delays no other call."""
        waiter = _Waiter()
        with self._lock:
            self._queue[waiter] = None
            front = next(iter(self._queue))
        try:
            if front is not waiter:
                if front.is_void:
                    self._wake_front()
                await waiter.wait()
            delay = self._next - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            self._next = max(time.monotonic(), self._next) + self._interval
        finally:
            with self._lock:
                was_front = next(iter(self._queue), None) is waiter
                self._queue.pop(waiter, None)
            if was_front:
                self._wake_front()

    def _wake_front(self) -> None:
        """Wake the first waiter whose loop still exists."""
        with self._lock:
            while self._queue and not next(iter(self._queue)).wake():
                self._queue.popitem(last=False)
