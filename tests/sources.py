"""Bytes in memory, for streams to read from, and the streams over them."""

import asyncio
import contextlib
import gc
from collections import deque

from decoding import sse

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.kinds import CaptionStream
from moondream_async._stream.opening import Opening

HERON = [{"chunk": "A grey "}, {"chunk": "heron "}, {"chunk": "stands."}]
DONE = {"completed": True, "request_id": "42", "finish_reason": "stop", "metrics": {"tokens": 3}}
TEXT = "A grey heron stands."
END = StopAsyncIteration


class Source:
    """Bytes that arrive as a test says.

    It is made of packets, of seconds to wait before the next, of functions that make an
    error to raise, and of END; `send` adds to them. Like a socket, it waits for ever for
    what does not come, loses nothing to a reader who is cancelled, and wakes one when it
    is closed.
    """

    def __init__(self, *script):
        self.closed = False
        self.finished = False
        self.asked = 0
        self._script = deque(script)
        self._news = asyncio.Event()
        self._at = None  # when the pause is over

    def send(self, *script):
        self._script.extend(script)
        self._news.set()

    async def __anext__(self):
        self.asked += 1
        while not self.closed:
            if not self._script:
                self._news.clear()
                await self._news.wait()
            elif isinstance(self._script[0], bytes):
                return self._script.popleft()
            elif isinstance(self._script[0], (int, float)):
                await self._pause()
            elif self._script[0] is END:
                self.closed = True
                raise StopAsyncIteration
            else:
                self.closed = True
                make_error = self._script.popleft()
                raise make_error()
        raise md.APIConnectionError("The connection was lost")

    async def _pause(self):
        loop = asyncio.get_running_loop()
        if self._at is None:
            self._at = loop.time() + self._script[0]
        self._news.clear()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), self._at - loop.time())
        if loop.time() >= self._at:
            self._at = None
            self._script.popleft()

    def close(self):
        self.closed = True
        self._news.set()

    async def finish(self):
        self.finished = True


def lost():
    return md.APIConnectionError("The connection was lost: reset")


def closed_by_client():
    return md.ClientClosedError("The client was closed")


def opened(source, stream=CaptionStream, skill="caption", *, waited=0.0, sent_at=None, **options):
    opening = Opening(decoder_for(skill), source, sent_at=sent_at, waited=waited)
    return stream(opening, **options)


def answered(*bodies):
    """A stream of events that have all arrived."""
    return opened(Source(*[sse(body) for body in bodies], END))


async def read_all(pieces):
    return [piece async for piece in pieces]


async def until_idle():
    """Let all tasks go on until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.contextmanager
def no_cycles():
    """What is freed in here is freed by reference counting."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
