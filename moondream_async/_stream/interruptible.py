"""Let Ctrl-C, and the stop button of a notebook, cancel a block."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .clock import running_loop

if TYPE_CHECKING:
    import asyncio

    import anyio


class _Handler:
    """The signal handler while blocks are open: one for all blocks, which end in any order."""

    def __init__(self) -> None:
        self.blocks: dict[anyio.CancelScope, asyncio.AbstractEventLoop] = {}
        self.interrupted: set[anyio.CancelScope] = set()
        self._previous: Any = None

    def add(self, scope: anyio.CancelScope) -> None:
        if not self.blocks:
            self._previous = signal.signal(signal.SIGINT, self)
        self.blocks[scope] = running_loop()

    def remove(self, scope: anyio.CancelScope) -> None:
        self.interrupted.discard(scope)
        del self.blocks[scope]
        current: object = signal.getsignal(signal.SIGINT)
        if not self.blocks and current is self:  # else other code has set its own handler
            signal.signal(signal.SIGINT, self._previous)

    def __call__(self, number: int, frame: Any) -> None:
        if self.interrupted:  # a second Ctrl-C: the block has not ended yet
            signal.default_int_handler(number, frame)
        for scope, loop in self.blocks.items():
            self.interrupted.add(scope)
            with suppress(RuntimeError):  # the loop was closed under the block
                loop.call_soon_threadsafe(scope.cancel)


_handler = _Handler()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C, or a notebook's stop button, cancel a block that awaits.

    >>> async def main():
    ...     with md.interruptible():
    ...         async with md.MoondreamClient() as client:
    ...             async for piece in (await client.caption(md.SAMPLE_IMAGE, stream=True)).chunk:
    ...                 pass  # as print(piece, end="", flush=True)
    >>> asyncio.run(main())

    Without this, a cell of IPython that is interrupted leaves its calls running and their
    connections open, and a kernel reacts to the stop button only when the next piece arrives.
    In the block, an interrupt cancels the awaited call at once, so that streams close their
    connections; then the block raises `KeyboardInterrupt`, and the lines after it do not run.
    A second interrupt during the cancellation raises `KeyboardInterrupt` at once.

    Python delivers signals to the main thread only: in other threads, the block has no effect.

    Raises:
        KeyboardInterrupt: The block was interrupted.
    """
    import anyio  # noqa: PLC0415 - importing the package stays light

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with anyio.CancelScope() as scope:
        _handler.add(scope)
        try:
            yield
        finally:
            interrupted = scope in _handler.interrupted
            _handler.remove(scope)
    if interrupted:
        raise KeyboardInterrupt
