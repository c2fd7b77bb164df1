"""What commands work with: a client, a picture, and a loop to run in."""

from __future__ import annotations

import os
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from moondream_async import CallEvent, Hooks, MoondreamClient, Timeout, fetch_image

from ._output import note

if TYPE_CHECKING:
    from moondream_async import EncodedImage

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
    watched = sys.stderr is not None and sys.stderr.isatty()
    hooks = Hooks(retry=_tell_retry if watched else None)
    return MoondreamClient(endpoint=endpoint, model=model, timeout=limits, hooks=hooks)


def _tell_retry(event: CallEvent) -> None:
    """Say to who waits at a terminal what they wait for."""
    note(f"Trying again in {event.delay or 0:.1f} s: {event.error}")


def at_home(path: str) -> str:
    """Return a path with its ``~`` replaced by the home, where the shell has left it."""
    return path if os.path.lexists(path) else os.path.expanduser(path)  # noqa: PTH111 - a string


def read_image(path: str) -> str | bytes | EncodedImage:
    """Return what a client takes for the argument IMAGE: a path, ``-``, or a web address.

    Raises:
        ImageError: The address is refused, or there is no picture.
        APIConnectionError: It can't be reached.
    """
    if path.lower().startswith(("http://", "https://")):
        images: list[EncodedImage] = []

        async def fetch() -> None:
            images.append(await fetch_image(path))

        run(fetch())
        return images[0]
    if path != "-":
        return at_home(path)
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
