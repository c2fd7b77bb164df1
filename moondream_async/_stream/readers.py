"""The iterators over a stream: its pieces of text, its events, an outline's updates.

All iterators read the same stream, and each goes on where another stopped. Each keeps the
stream alive. Each loop has its own iterator, which is freed when the loop ends: so the end of a
loop whose task is cancelled is noticed (`owner`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from moondream_async.results import BboxEvent, FinalEvent, StreamEvent

from .owner import end_loop

if TYPE_CHECKING:
    from typing import Self

    from .stream import Stream

Item = TypeVar("Item")


class Reader(AsyncIterator[Item]):
    """The base of the iterators."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        self._stream._belong_to_reader()  # noqa: SLF001 - a part of the stream
        return type(self)(self._stream)

    def __anext__(self) -> Coroutine[Any, Any, Item]:
        """Return the next item. Cancelling it closes the stream."""
        return self.next_of(self._stream)

    @staticmethod
    async def next_of(stream: Stream[Any]) -> Item:
        """Return the next item of a stream."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Close the stream, as its own `aclose` does."""
        await self._stream.aclose()

    def close(self) -> None:
        """Close the stream without waiting, from any thread; Django calls it after a request."""
        self._stream._close()  # noqa: SLF001 - a part of the stream

    def __del__(self) -> None:
        try:
            end_loop(self._stream)
        except (AttributeError, ImportError):
            return  # `__init__` failed, or the interpreter ends

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} objects can't be copied: there is one stream")


class Pieces(Reader[str]):
    """The pieces of a stream's text."""

    __slots__ = ()

    async def __anext__(self) -> str:
        """Return the next piece of text. Cancelling it closes the stream."""
        # The same as `next_of`, without another function's call for each piece.
        stream = self._stream
        while True:
            for piece in stream._ready:  # noqa: SLF001 - a part of the stream
                if piece:
                    return piece
            await stream._fill()  # noqa: SLF001 - a part of the stream

    @staticmethod
    async def next_of(stream: Stream[Any]) -> str:
        """Return the next piece of text. Cancelling it closes the stream."""
        while True:
            for piece in stream._ready:  # noqa: SLF001 - a part of the stream
                if piece:
                    return piece
            await stream._fill()  # noqa: SLF001 - a part of the stream


class Events(Reader[StreamEvent]):
    """A stream's events, those of unknown kinds included."""

    __slots__ = ()

    @staticmethod
    async def next_of(stream: Stream[Any]) -> StreamEvent:
        """Return the next event. Cancelling it closes the stream."""
        while True:
            event = stream._next_event()  # noqa: SLF001 - a part of the stream
            if event is not None:
                return event
            await stream._fill()  # noqa: SLF001 - a part of the stream


class Updates(Reader[dict[str, Any]]):
    """An outline's updates, in the form of the official SDK."""

    __slots__ = ()

    @staticmethod
    async def next_of(stream: Stream[Any]) -> dict[str, Any]:
        """Return the next update. Cancelling it closes the stream."""
        while True:
            event = await Events.next_of(stream)
            if isinstance(event, FinalEvent):
                path = stream.text_so_far if stream["path"] is None else stream["path"]
                return {"path": path, "bbox": stream["bbox"], "completed": True}
            if isinstance(event, BboxEvent):
                return {"bbox": event.bbox}
            if event.chunk:
                return {"chunk": event.chunk}
