"""What goes into a watch and what comes out of it."""

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
    """A picture out of a moving one; what the sources in `moondream_async.frames` give.

    >>> Frame(b"", time=1.5, index=45)
    <Frame 45 at 1.500 s>
    """

    image: Any
    """The picture, as `caption` takes it; of the sources, an RGB array."""
    time: float
    """Seconds since the beginning, by the source's own timestamps."""
    index: int
    """The place among the frames that the source gave, from 0."""

    def __repr__(self) -> str:
        return f"<Frame {self.index} at {self.time:.3f} s>"


class WatchResult(msgspec.Struct, Generic[FrameT, AnswerT], frozen=True, kw_only=True):
    """What became of one frame: a result or an error.

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
    """The place of the frame among all that the iterable gave, from 0."""
    result: AnswerT = None  # type: ignore[assignment] # or else `ok` would have to be asked twice
    """The skill's answer, or its stream with ``stream=True``; None where `ok` is false."""
    error: MoondreamError | None = None
    """Why there is no answer."""
    taken_at: float
    """When the iterable gave the frame, in seconds since 1970."""
    age: float
    """Seconds from then until this result was handed out."""
    skipped: int
    """How many frames have been passed over since the result before this one."""

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None


class WatchOptions(Arguments, total=False):
    """What `MoondreamClient.watch` takes by name, beside `stream`."""

    in_flight: int
    max_age: float | None
    on_error: OnError
    supersede: bool
