"""What an answer is made of, before a socket is near.

A plain answer is one `Reply`. A streamed one is a row of steps: a dialect makes
`Event`s, a fault makes a worse row of them. The server alone carries them out:
it writes, waits and hangs up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from .received import ReceivedRequest


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int = 200
    body: str | bytes | dict[str, Any] | None = None
    """JSON if it is a dict; None is the dialect's own error body for the status."""
    headers: dict[str, str] = {}
    content_type: str = "text/plain"
    """What a text or bytes are."""


class Event(msgspec.Struct, frozen=True):
    """Bytes to send, in one write."""

    data: bytes
    tokens: int = 0
    """How many tokens these bytes carry: the server's rate sets how long that takes."""
    last: bool = False
    """Whether the answer is complete with this event, or after it."""


class Wait(msgspec.Struct, frozen=True):
    """Send nothing for so long."""

    seconds: float | None
    """None is for ever: until the client goes away."""


class Hold(msgspec.Struct, frozen=True):
    """Send nothing until a test lets it go on."""

    released: Callable[[], bool]
    """Asked again whenever anything changes."""


class HangUp(msgspec.Struct, frozen=True):
    """Close the connection where it stands; no chunked terminator is sent."""

    reset: bool = False
    """With a TCP reset in place of an orderly end."""


Step = Event | Wait | Hold | HangUp
Steps = Iterator[Step]

Auth = Literal["key", "bearer", "optional", "none"]
"""Which header must hold the key: X-Moondream-Auth; that or Authorization; Authorization if any."""


class Route(msgspec.Struct, frozen=True):
    """Which requests an endpoint answers."""

    method: str
    path: str
    """As aiohttp writes them: ``/v1/batch/{id}``."""
    endpoint: Callable[[ReceivedRequest], Awaitable[Reply | Steps]]
    """Raises `RefusedError` for a request that can't be served."""
    auth: Auth = "key"
    uploads: int = 0
    """The body is bytes, up to so many, and not JSON; 0 is JSON."""
    skill: str = ""
    """What of a script answers here; "" is nothing."""
