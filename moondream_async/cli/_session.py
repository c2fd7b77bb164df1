"""What commands work with: the user's picture, a loop to run in, and a server's port."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from moondream_async import fetch_image
from moondream_async.errors import MoondreamError

if TYPE_CHECKING:
    from moondream_async import EncodedImage

T = TypeVar("T")

_STDIN = 0  # by its number, since sys.stdin is None where it is closed
_READ_BYTES = 1 << 20


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
        return run(fetch_image(path))
    if path != "-":
        return at_home(path)
    # Read here: the client would read in a thread, which Ctrl-C can't end. And in pieces: a
    # signal between two reads within one call would wait for the end of the second.
    pieces = []
    while piece := os.read(_STDIN, _READ_BYTES):
        pieces.append(piece)
    return b"".join(pieces)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; Ctrl-C cancels it, and is raised when it has cleaned up."""
    import asyncio  # noqa: PLC0415 - --help and errors of usage do without

    return asyncio.run(main)


@contextlib.asynccontextmanager
async def listening(
    server: contextlib.AbstractAsyncContextManager[Any], where: str
) -> AsyncIterator[None]:
    """Start a server; a port that can't be had is a MoondreamError in the system's words."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(server)
        except (OSError, UnicodeError) as error:  # UnicodeError: a host that can't be a name
            errno = getattr(error, "errno", None) or 0
            reason = os.strerror(errno) if errno > 0 else str(error)  # asyncio names the address
            raise MoondreamError(f"Can't listen on {where}: {reason}") from error
        yield
