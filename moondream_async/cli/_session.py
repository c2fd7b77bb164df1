"""What commands work with: a client, a picture, and a loop to run in."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import Any

from moondream_async import MoondreamClient, Timeout

_STDIN = 0  # by its number, since sys.stdin is None where it is closed
_READ_BYTES = 1 << 20


def make_client(
    *, endpoint: str | None = None, model: str | None = None, timeout: float | None = None
) -> MoondreamClient:
    """Return the client that the common options ask for; the key comes from the environment.

    A `timeout` in seconds is for the whole answer, and stands in for the limits on
    its parts, or a patient user would still be told that there was no beginning.
    """
    limits = Timeout() if timeout is None else Timeout(first_event=None, idle=None, total=timeout)
    return MoondreamClient(endpoint=endpoint, model=model, timeout=limits)


def read_image(path: str) -> str | bytes:
    """Return what a client takes for the argument IMAGE."""
    if path != "-":
        return path
    # Not left to the client, where Ctrl-C could not end a read in a thread. And piece by
    # piece, since a signal between two reads of one call would wait for the second to end.
    pieces = []
    while piece := os.read(_STDIN, _READ_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; Ctrl-C cancels it, and is raised when it has cleaned up."""
    import asyncio  # noqa: PLC0415 - --help and errors of usage do without

    async def whole() -> None:
        await main

    asyncio.run(whole())
