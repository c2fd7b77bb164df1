"""What commands work with: a client, a picture, and a loop to run in."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from moondream_async import MoondreamClient, Timeout


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
    # Here, since Ctrl-C would not end a read in one of the client's threads; and by its
    # number, since sys.stdin may be closed.
    with open(0, "rb", closefd=False) as stdin:
        return stdin.read()


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; Ctrl-C cancels it, and is raised when it has cleaned up."""
    import asyncio  # noqa: PLC0415 - --help and errors of usage do without

    asyncio.run(main)
