"""A clock that belongs to the test: time passes when nothing is left to do but to wait for it.

So an hour takes a moment, and what happens at which second is known exactly. A file of tests
has it by ``pytestmark = pytest.mark.own_time``, and its tests by the fixture `clock`.

It replaces what belongs to Python: ``time.monotonic``, and the waiting for sockets in
the event loop. Where sockets are open, it lets them have what is on its way first.
"""

import asyncio
import selectors
import time

_ON_ITS_WAY = 0.005  # real seconds; over loopback, what was sent is there at once


class OwnClock:
    """The time, from some odd moment on.

    Attributes:
        now: What ``time.monotonic`` says.
    """

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def new_loop(self):
        return asyncio.SelectorEventLoop(_Selector(self))


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            return super().select(None)
        # The loop's own socket, by which it is woken from elsewhere, is always there.
        if len(self.get_map()) > 1:
            ready = super().select(_ON_ITS_WAY)
        if not ready:
            self._clock.now += timeout
        return ready
