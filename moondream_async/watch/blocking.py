"""An ordinary iterable of frames, read in a thread of its own, so that it may block.

A frame is read when it is asked for, not ahead. The thread is a daemon: if it hangs in a
camera's driver, neither the loop nor the end of the interpreter waits for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from typing import Any

_END = object()
_GOODBYE = 1.0  # seconds to wait for a thread that only has to end


class BlockingFrames:
    """The frames of an iterable as an asynchronous iterator, which has to be closed."""

    def __init__(self, frames: Iterable[Any]) -> None:
        self._frames = frames
        self._loop = asyncio.get_running_loop()
        self._wanted = threading.Semaphore(0)
        self._closed = False
        self._next: asyncio.Future[tuple[Any, BaseException | None]] | None = None
        self._thread = threading.Thread(
            target=self._read, name="moondream_async frames", daemon=True
        )

    def __aiter__(self) -> BlockingFrames:
        return self

    async def __anext__(self) -> Any:
        """Return the next frame; raise the iterable's own exceptions."""
        if self._thread.ident is None:
            self._thread.start()
        self._next = self._loop.create_future()
        self._wanted.release()
        frame, error = await self._next
        self._next = None
        if error is not None:
            raise error
        if frame is _END:
            raise StopAsyncIteration
        return frame

    def close(self) -> None:
        """End the thread, at once unless the iterable blocks."""
        self._closed = True
        self._wanted.release()
        if self._thread.ident is not None and (self._next is None or self._next.done()):
            self._thread.join(_GOODBYE)

    def _read(self) -> None:
        iterator: Iterator[Any] | None = None
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            frame, failure = _END, None
            try:
                if iterator is None:
                    iterator = iter(self._frames)
                frame = next(iterator, _END)
            except BaseException as error:  # noqa: BLE001 - raised where the frame is awaited
                failure = error
            try:
                self._loop.call_soon_threadsafe(self._deliver, frame, failure)
            except RuntimeError:  # the loop was closed
                return
            frame = failure = None  # else this thread keeps the frame until the next one

    def _deliver(self, frame: Any, error: BaseException | None) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result((frame, error))
