"""The input and output of a watch."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from typing import Any, Generic, Literal, TypeVar

import msgspec

from moondream_async.bulk.items import Arguments
from moondream_async.errors import MoondreamError

FrameT = TypeVar("FrameT")
AnswerT = TypeVar("AnswerT")
Frames = Iterable[FrameT] | AsyncIterable[FrameT]
OnError = Literal["skip", "raise"]


class Frame(msgspec.Struct, frozen=True, eq=False):
    """A picture of a video or a camera, as the sources in `moondream_async.frames` yield it.

    >>> Frame(b"", time=1.5, index=45)
    <Frame 45 at 1.500 s>
    """

    image: Any
    """The picture, in any form that `caption` takes; the sources give an RGB array."""
    time: float
    """Seconds since the beginning, by the source's own timestamps."""
    index: int
    """The number of the frame in its source, from 0."""

    def __repr__(self) -> str:
        return f"<Frame {self.index} at {self.time:.3f} s>"


class WatchResult(msgspec.Struct, Generic[FrameT, AnswerT], frozen=True, kw_only=True):
    """The result of one frame, or its error.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         async for each in client.watch([md.SAMPLE_IMAGE], "point", object="red circle"):
    ...             print(each.index, each.skipped, each.result.points if each.ok else each.error)
    >>> asyncio.run(main())
    0 0 [Point(x=0.2184, y=0.5412)]
    """

    frame: FrameT
    """The frame, as it was handed in."""
    index: int
    """The number of the frame in its iterable, from 0."""
    result: AnswerT = None  # type: ignore[assignment] # so that users need no check beside `ok`
    """The skill's answer, or its stream with ``stream=True``; None where `ok` is false."""
    error: MoondreamError | None = None
    """Why there is no answer; None where `ok` is true."""
    taken_at: float
    """When the iterable gave the frame, in seconds since 1970."""
    age: float
    """Seconds from `taken_at` until this result was handed out."""
    skipped: int
    """How many frames lie between the result before and this one."""

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None


class WatchOptions(Arguments, total=False):
    """The keyword arguments of `MoondreamClient.watch`, apart from `stream`."""

    in_flight: int
    max_age: float | None
    on_error: OnError
    supersede: bool
