"""The kinds of streams, one for each skill that has one."""

from __future__ import annotations

from typing import Any

from moondream_async.results import (
    CaptionResult,
    ChatResult,
    QueryResult,
    Region,
    SegmentResult,
)

from .readers import Updates
from .stream import Stream


class CaptionStream(Stream[str]):
    """A description, as it is written. ``stream["caption"]`` is the same as `chunk`.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         async with client.caption(md.SAMPLE_IMAGE, stream=True) as stream:
    ...             pieces = [piece async for piece in stream["caption"]]
    ...             return "".join(pieces) == stream.text_so_far == (await stream.result()).caption
    >>> asyncio.run(main())
    True
    """

    __slots__ = ()
    _key = "caption"

    async def result(self) -> CaptionResult:
        """Read to the end; return the whole result, as the call without `stream` gives it."""
        result = await super().result()
        assert isinstance(result, CaptionResult)  # noqa: S101 - for the type checker
        return result


class QueryStream(Stream[str]):
    """An answer, as it is written. ``stream["answer"]`` is the same as `chunk`.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         async with client.query(md.SAMPLE_IMAGE, "How many?", True) as stream:
    ...             pieces = [piece async for piece in stream["answer"]]
    ...             return "".join(pieces) == stream.text_so_far == (await stream.result()).answer
    >>> asyncio.run(main())
    True
    """

    __slots__ = ()
    _key = "answer"

    async def result(self) -> QueryResult:
        """Read to the end; return the whole result, as the call without `stream` gives it."""
        result = await super().result()
        assert isinstance(result, QueryResult)  # noqa: S101 - for the type checker
        return result


class SegmentStream(Stream[dict[str, Any]]):
    """The outline of an object, as it is drawn.

    The pieces of text belong to a first, coarse path. `path` is the refined path, which
    replaces them; the server sends it at the end.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         async with client.segment(md.SAMPLE_IMAGE, "red circle", stream=True) as stream:
    ...             updates = [update async for update in stream]
    ...             return updates[0], updates[-1]["path"] == (await stream.result()).path
    >>> asyncio.run(main())
    ({'bbox': Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)}, True)
    """

    __slots__ = ()
    _key = "path"
    _items = Updates

    def __getitem__(self, key: str) -> Any:
        """Return `chunk` for ``chunk``, or an attribute, as `path` and `bbox`, under its name."""
        if key in ("path", "bbox", "parse_error"):
            return getattr(self, key)
        return super().__getitem__(key)

    @property
    def bbox(self) -> Region | None:
        """The box of the object; None until the server has sent it."""
        return self._decoder.bbox

    @property
    def path(self) -> str | None:
        """SVG path data with coordinates 0-1 of `bbox`; None before the end."""
        return self._decoder.path

    @property
    def parse_error(self) -> str | None:
        """The server's message if it could not read the outline that the model wrote."""
        return self._decoder.parse_error

    async def result(self) -> SegmentResult:
        """Read to the end; return the whole result, as the call without `stream` gives it."""
        result = await super().result()
        assert isinstance(result, SegmentResult)  # noqa: S101 - for the type checker
        return result


class ChatStream(Stream[str]):
    """The next turn of a conversation, as it is written. ``stream["message"]`` is `chunk`.

    `reasoning` grows while the model thinks; `events` gives its pieces as they come.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         async with client.chat([{"role": "user", "content": "Hello"}], True) as stream:
    ...             pieces = [piece async for piece in stream["message"]]
    ...             return "".join(pieces) == (await stream.result()).message.content
    >>> asyncio.run(main())
    True
    """

    __slots__ = ()
    _key = "message"

    async def result(self) -> ChatResult:
        """Read to the end; return the whole result, as the call without `stream` gives it."""
        result = await super().result()
        assert isinstance(result, ChatResult)  # noqa: S101 - for the type checker
        return result
