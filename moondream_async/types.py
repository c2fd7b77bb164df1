"""What goes in: pictures, settings, limits of time, and hooks. Frozen values."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Union

import msgspec

from ._checks import check_positive

if TYPE_CHECKING:
    import PIL.Image

Length = Literal["short", "normal", "long"]


class Settings(TypedDict, total=False):
    """Sampling settings. Type checkers take a key that is not listed here for a misspelt one.

    The client does not: what it does not know goes to the server as it is, from any mapping.

    >>> settings: Settings = {"temperature": 0, "max_tokens": 100}
    """

    temperature: float  # >= 0
    top_p: float  # > 0, <= 1
    max_tokens: int  # >= 1
    max_objects: int  # >= 1; detect and point


class Timeout(msgspec.Struct, frozen=True, kw_only=True):
    """How long to wait for what, in seconds; None is for ever.

    The clock of `first_event` and `idle` runs only while a reader waits for the
    server. Heartbeat comments and half events are not progress.

    Raises:
        RequestError: A limit is not a positive number.

    >>> Timeout(idle=15)
    Timeout(pool=30.0, connect=10.0, first_event=120.0, idle=15, total=None)
    """

    pool: float | None = 30.0
    """Until one of the client's `max_connections` connection slots is free."""
    connect: float | None = 10.0
    """Until a new connection stands: name look-up, TCP and TLS."""
    first_event: float | None = 120.0
    """From the request's last byte to the first event, or to the whole of a plain answer."""
    idle: float | None = 60.0
    """Between two events."""
    total: float | None = None
    """From the call to the end of the answer, waiting and retries included."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None:
                check_positive(f"Timeout.{name}", value, "a number of seconds over 0, or None")


def to_timeout(timeout: Timeout | float) -> Timeout:
    """Return the limits that an argument means; a number is the `total`.

    Raises:
        RequestError: It is neither.

    >>> to_timeout(90).total
    90
    """
    if isinstance(timeout, Timeout):
        return timeout
    check_positive("timeout", timeout, "a Timeout, or a number of seconds over 0")
    return Timeout(total=timeout)


class EncodedImage(msgspec.Struct, frozen=True, eq=False, weakref=True):
    """A picture as it will be sent: prepared once, used in any number of calls.

    >>> image = EncodedImage(b"GIF89a", "image/gif", 1, 1)
    >>> image, image.image_url
    (EncodedImage(image/gif, 1x1, 6 bytes), 'data:image/gif;base64,R0lGODlh')
    """

    data: bytes
    """The encoded picture, before base64."""
    media_type: str
    """As ``image/jpeg``."""
    width: int
    """Pixels, as the server will see it."""
    height: int
    """Pixels."""

    @property
    def image_url(self) -> str:
        """The picture as a ``data:`` URL, as the official SDK has it; made anew each time."""
        return f"data:{self.media_type};base64,{b2a_base64(self.data, newline=False).decode()}"

    def __repr__(self) -> str:
        return (
            f"EncodedImage({self.media_type}, {self.width}x{self.height}, {len(self.data)} bytes)"
        )


class Array(Protocol):
    """What a numpy array has; numpy itself is not needed."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The buffer, its shape and its type of number."""


SAMPLE_IMAGE = Path(__file__).parent / "simulator" / "sample.jpg"
"""The path of a picture that comes along, to try things with: a JPEG of 640x480 pixels."""

ImageInput = Union[
    str,
    "os.PathLike[str]",
    bytes,
    bytearray,
    memoryview,
    IO[bytes],
    "PIL.Image.Image",
    Array,
    EncodedImage,
]
"""Whatever a picture can be given as: a path, its bytes, an open file, a PIL image, a numpy
array, or what ``encode_image`` returned."""


Outcome = Literal["complete", "interrupted", "abandoned", "cancelled", "failed"]
"""How a call ended: its answer came whole; a stream stopped before its end; the stream or the
client was closed, the stream dropped, or the browser that it was passed on to left; whoever
waited for it was cancelled; it failed otherwise."""


class CallEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened in a call; what a hook is given."""

    call_id: str
    """One for all attempts of a call, and no other's."""
    skill: str | None
    """None for calls that are no skill, as a list of models."""
    model: str | None
    """The model that was asked for; None leaves it to the server."""
    endpoint: str
    """The server's address, as the client has it."""
    stream: bool
    attempt: int
    """Number of the attempt, from 1; 0 where the call ended before its first attempt."""
    seconds: float
    """Since the call began."""
    request_id: str | None = None
    """The server's, once it is known."""
    delay: float | None = None
    """For a retry: seconds until it."""
    error: BaseException | None = None
    """For a retry: why. For an end: what the call failed with."""
    completed: bool = False
    """For an end: whether the answer came whole. It didn't if it was cancelled or dropped."""
    outcome: Outcome | None = None
    """For an end: how it came."""
    finish_reason: str | None = None
    """For an end: ``stop``, or ``length`` where the answer was cut; if the server said so."""
    input_tokens: int | None = None
    """For an end, if the server said so."""
    output_tokens: int | None = None
    """For an end, if the server said so."""
    bytes_sent: int = 0
    """For an end: of the bodies of all attempts."""
    bytes_received: int = 0
    """For an end: of the bodies of all answers."""
    ttft: float | None = None
    """For an end of a stream: seconds from sending to the first piece of text."""


class Hooks(msgspec.Struct, frozen=True, kw_only=True):
    """Functions to be told what a client's calls do, as to count and to time them.

    They are called in the event loop of the call and must be quick; one that raises
    is logged and disturbs nothing. The order is `request`, `retry` and `request` again for
    each further attempt, `first_chunk` of a stream, `end`. Each call has one `end`, however it
    comes: also one that never got as far as a request, and a stream that was dropped.

    >>> async def main():
    ...     hooks = md.Hooks(end=lambda event: print(event.skill, event.outcome, event.attempt))
    ...     async with md.MoondreamClient(hooks=hooks) as client:
    ...         await client.detect(md.SAMPLE_IMAGE, "circle")
    >>> asyncio.run(main())
    detect complete 1
    """

    request: Callable[[CallEvent], object] | None = None
    """A request is about to be sent."""
    first_chunk: Callable[[CallEvent], object] | None = None
    """A stream gave its first piece of text."""
    retry: Callable[[CallEvent], object] | None = None
    """An attempt failed, and another will follow after `CallEvent.delay`."""
    end: Callable[[CallEvent], object] | None = None
    """A call or stream has ended, one way or another."""
