"""What goes in: pictures, settings, timeouts and hooks. Their values can't be changed."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypedDict, Union

import msgspec

from ._checks import check_positive
from .errors import RequestError

if TYPE_CHECKING:
    import PIL.Image

Length = Literal["short", "normal", "long"]


class Settings(TypedDict, total=False):
    """Sampling settings. Type checkers report a key that is not listed here.

    At run time any mapping will do, and unknown keys go to the server unchanged.

    >>> settings: Settings = {"temperature": 0, "max_tokens": 100}
    """

    temperature: float  # >= 0
    top_p: float  # > 0, <= 1
    max_tokens: int  # >= 1
    max_objects: int  # >= 1; detect and point


class Timeout(msgspec.Struct, frozen=True, kw_only=True):
    """Limits on waiting, in seconds; None is no limit.

    The clock of `first_event` and `idle` runs only while a reader waits for the server.
    Heartbeat comments and incomplete events do not restart it.

    Raises:
        RequestError: A limit is not a positive number.

    >>> Timeout(idle=15)
    Timeout(pool=30.0, connect=10.0, first_event=120.0, idle=15, total=None)
    """

    pool: float | None = 30.0
    """Until one of the client's `max_connections` connection slots is free."""
    connect: float | None = 10.0
    """Until a new connection is open: name look-up, TCP and TLS."""
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
    """Return the argument `timeout` as a Timeout; a number is the `total`.

    Raises:
        RequestError: It is neither a Timeout nor a number over 0.

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
    """``image/jpeg``, for example."""
    width: int
    """Pixels, as the server will see the picture."""
    height: int
    """Pixels."""

    @property
    def image_url(self) -> str:
        """The picture as a ``data:`` URL, as in the official SDK; made anew each time."""
        return f"data:{self.media_type};base64,{b2a_base64(self.data, newline=False).decode()}"

    def __repr__(self) -> str:
        return (
            f"EncodedImage({self.media_type}, {self.width}x{self.height}, {len(self.data)} bytes)"
        )


class Array(Protocol):
    """A numpy array, or another object with its interface; numpy itself is not needed."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """The buffer, its shape and the type of its numbers."""


SAMPLE_IMAGE = Path(__file__).parent / "simulator" / "sample.jpg"
"""The path of a picture for trials, part of the package: a JPEG of 640x480 pixels."""

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
"""The forms of a picture: a path, its bytes, an open file, a PIL image, a numpy array, or what
``encode_image`` returned."""


Outcome = Literal["complete", "interrupted", "abandoned", "cancelled", "failed"]
"""How a call ended, in this order: its answer came whole; the stream stopped before its end; the
stream or client was closed, the stream dropped, or a browser that it was relayed to left; the task
that waited for it was cancelled; the call failed in another way."""


class CallEvent(msgspec.Struct, frozen=True, kw_only=True):
    """The argument of a hook: a moment in a call."""

    call_id: str
    """An id of this call alone, the same for all its attempts."""
    skill: str | None
    """None for calls that are no skill, as for the list of models."""
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
    """The server's id for the request, once it is known."""
    delay: float | None = None
    """For a retry: seconds until it begins."""
    error: BaseException | None = None
    """For a retry: its reason. For an end: the error of the call."""
    completed: bool = False
    """For an end: whether the answer came whole, and was neither cancelled nor dropped."""
    outcome: Outcome | None = None
    """For an end: how the call ended."""
    finish_reason: str | None = None
    """For an end: ``stop``, or ``length`` where the answer was cut; None if the server left it
    out."""
    input_tokens: int | None = None
    """For an end: None if the server left it out."""
    output_tokens: int | None = None
    """For an end: None if the server left it out."""
    bytes_sent: int = 0
    """For an end: the bytes of the bodies of all attempts."""
    bytes_received: int = 0
    """For an end: the bytes of the bodies of all answers."""
    ttft: float | None = None
    """For an end of a stream: seconds from sending to the first piece of text."""


class Hooks(msgspec.Struct, frozen=True, kw_only=True):
    """Functions that are notified of what a client's calls do, as to count and time them.

    They are called in the event loop of the call and must be quick; an exception in a hook is
    logged and disturbs nothing. The order is `request`, `retry` and `request` again for each
    further attempt, `first_chunk` of a stream, `end`. Each call has exactly one `end`, also a
    call that failed before its first request, and a stream that was dropped.

    Raises:
        RequestError: A hook is no function, or a coroutine function, which nobody would await.

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
    """A call or stream has ended; `CallEvent.outcome` says how."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if (hook := getattr(self, name)) is not None and not _is_ordinary(hook):
                raise RequestError(f"Hooks.{name} must be an ordinary function, not {hook!r}")


def _is_ordinary(hook: Any) -> bool:
    from inspect import iscoroutinefunction  # noqa: PLC0415 - slow, and few clients have hooks

    ways = (hook, getattr(type(hook), "__call__", None))  # noqa: B004 - of an object, or None
    return callable(hook) and not any(map(iscoroutinefunction, ways))
