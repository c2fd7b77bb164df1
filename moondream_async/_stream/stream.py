"""`Stream`: an answer as it is written, as callers see it; `reading` fills and ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NoReturn, Self

from moondream_async.results import Reasoning, Result, StreamEvent, Usage

from .readers import Events, Pieces, Reader
from .reading import SUPERSEDED, Reading
from .relay import ByteStream, EventStream

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ItemT_co = TypeVar("ItemT_co", default=Any, covariant=True)
else:
    from typing import TypeVar

    ItemT_co = TypeVar("ItemT_co", covariant=True)


class Stream(Reading, Generic[ItemT_co]):
    """An answer as it is written; iterate over it, or over `chunk`.

    A stream belongs to the task that reads it; one task reads at a time. When that task is
    cancelled, while it waits for text or between two pieces, the stream is closed, even if other
    code still holds it: the server need not work for a reader who has gone. To wait with a time
    limit and read on, use `Timeout.idle`, or ``asyncio.wait`` on a task that reads.

    Read a stream to the end, `aclose` it, or leave its ``async with``; a stream that is dropped
    earlier closes its connection and warns.

    Reading raises:
        StreamInterruptedError: The connection ended before the answer did.
        StreamStalledError: No event came for `Timeout.idle`, or `Timeout.total` is over.
        StreamServerError: The server reported an error in the stream.
        StreamProtocolError: The server sent something other than events.
        APITimeoutError: No event came for `Timeout.first_event`.
        ClientClosedError: The stream or its client was closed before or meanwhile, or the task
            that read it was cancelled.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         stream = await client.caption(md.SAMPLE_IMAGE, "short", stream=True)
    ...         async for piece in stream.chunk:  # `stream.events` has more
    ...             first = piece
    ...             break
    ...         await stream.aclose()  # `async with stream:` does this by itself
    ...         return first
    >>> asyncio.run(main())
    'A'
    """

    __slots__ = ()
    _key: ClassVar[str] = "chunk"
    _items: ClassVar[type[Reader[Any]]] = Pieces

    # -- reading ------------------------------------------------------------------

    @property
    def chunk(self) -> AsyncIterator[str]:
        """The pieces of text, as they arrive. The iterator alone keeps the stream alive."""
        return Pieces(self)

    @property
    def events(self) -> AsyncIterator[StreamEvent]:
        """Typed events in place of text; an event of an unknown kind is an `UnknownEvent`.

        `events` and `chunk` read the same stream: each goes on where the other stopped.
        """
        return Events(self)

    def __getitem__(self, key: str) -> Any:
        """Return `chunk` for ``chunk`` and the skill's own key, or a fact under its own name."""
        if key in ("chunk", self._key):
            return self.chunk
        if key in ("request_id", "finish_reason", "metrics", "reasoning", "usage"):
            return getattr(self, key)
        raise KeyError(key)

    # With `__getitem__` alone it would pass for a sequence, and Django would read it as one.
    __iter__ = None

    def __aiter__(self) -> AsyncIterator[ItemT_co]:
        self._belong_to_reader()
        return self._items(self)  # each loop has its own iterator: see `readers`

    def __anext__(self) -> Coroutine[Any, Any, ItemT_co]:
        """Return the next piece of text. Cancelling it closes the stream."""
        return self._items.next_of(self)

    async def text(self) -> str:
        """Read to the end; return the whole text, with the pieces that were handed out before.

        When it raises, `text_so_far` has the text that had arrived. Cancelling it closes the
        stream.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return await stream.text() == await stream.text()
        >>> asyncio.run(main())
        True
        """
        while True:
            self._ready = iter(())
            try:
                await self._fill()
            except StopAsyncIteration:
                return self.text_so_far

    async def result(self) -> Result:
        """Read to the end; return the whole result, as the call without `stream` gives it.

        Raises what `text` raises. Cancelling it closes the stream.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return sorted(await stream.result())
        >>> asyncio.run(main())
        ['caption', 'request_id']
        """
        return self._decoder.result(await self.text(), self._headers)

    def sse(self, *, heartbeat: float | None = 15.0) -> EventStream:
        """Return the rest of the stream as Server-Sent Events in bytes, to relay to a browser.

        The events have these names, and a JSON object as their data::

            chunk      {"chunk": "..."}, a piece of the text
            reasoning  {"text": "..."}, a piece of a chat's reasoning
            bbox       {"bbox": {...}}, the box of an outline, as soon as it is known
            done       request_id, finish_reason, metrics, usage and reasoning; for an outline
                       bbox, path and parse_error, too; null where the server said nothing
            error      {"error": {"type": the exception's name, "message": "...", ...}}, with
                       `status` or `phase` if the exception has one

        The last event is either ``done`` or ``error``: errors of the stream are not raised.
        Comments, which readers of events ignore, are sent at the start, so that the browser
        gets the head of the response, and each time the server has sent nothing for `heartbeat`
        seconds; None sends no comments. Comments do not count as progress for `Timeout`.

        The stream is closed at once when what this returns is closed or dropped, or when the
        task that reads it is cancelled; web frameworks do one of these when the browser has
        gone. aiohttp.web does so with ``handler_cancellation=True``. Without it, as with
        Starlette under servers of ASGI 2.4, the next write fails, after `heartbeat` seconds at
        most.

        Send `headers` of what this returns with the response. In the browser, close an
        ``EventSource`` at ``done`` and ``error``, or it sends the request again.

        Raises:
            RequestError: `heartbeat` is neither a positive number nor None.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             events = stream.sse()
        ...             async for piece in events:  # blocks of whole events
        ...                 last = piece
        ...     return events.headers["Content-Type"], b"event: done" in last
        >>> asyncio.run(main())
        ('text/event-stream', True)
        """
        relay = EventStream(self, heartbeat)
        self._relayed = True
        return relay

    def chunk_bytes(self) -> ByteStream:
        """Return the rest of the text as UTF-8 in bytes, to relay to a client.

        Send `headers` of what this returns with the response. Errors of the stream are raised,
        so that the response breaks off instead of passing for a whole one. The stream is closed
        at once when what this returns is closed or dropped, or when the task that reads it is
        cancelled.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             data = b"".join([piece async for piece in stream.chunk_bytes()])
        ...             return data.decode() == stream.text_so_far
        >>> asyncio.run(main())
        True
        """
        self._relayed = True
        return ByteStream(self)

    # -- what is known ------------------------------------------------------------

    @property
    def text_so_far(self) -> str:
        """The text that was handed out so far."""
        return self._text()

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the server's response; names are found in upper and lower case."""
        return self._headers

    @property
    def completed(self) -> bool:
        """Whether the server has said that the answer is complete."""
        return self._decoder.completed

    @property
    def request_id(self) -> str | None:
        """The server's id of the request; None until the server has sent it."""
        return self._decoder.request_id

    @property
    def finish_reason(self) -> str | None:
        """``stop``, or ``length`` if the answer was cut at `max_tokens`; None before the end."""
        return self._decoder.finish_reason

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Counts of tokens and times, under the server's own names; None before the end."""
        return self._decoder.metrics

    @property
    def reasoning(self) -> Reasoning | None:
        """The model's reasoning that has arrived; None if there is none."""
        return self._decoder.reasoning

    @property
    def usage(self) -> Usage | None:
        """The token counts of a chat; None before the end."""
        return self._decoder.usage

    @property
    def ttft(self) -> float | None:
        """Seconds from the sending of the request to the first piece of text."""
        return self._ttft

    def __repr__(self) -> str:
        state = "complete" if self.completed else "closed" if self._is_over() else "open"
        name = type(self).__name__
        return f"<{name} {state}, {len(self.text_so_far)} characters, request {self.request_id}>"

    # -- the end ------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    if not TYPE_CHECKING:  # type checkers say by themselves that there are none

        def __enter__(self) -> NoReturn:
            raise TypeError("A stream is entered with 'async with': its end may be waited for")

        __exit__ = __enter__

    async def aclose(self) -> None:
        """Close the stream; from any task, at any time, and more than once.

        An unfinished stream drops its connection at once, so that the server stops working; a
        task that waits for text gets a `ClientClosedError`. A complete stream gives its
        connection back to the pool. Cancelling `aclose` drops the connection.
        """
        try:
            if self.completed and self._source is not None:
                await self._source.finish()
        finally:
            self._close()

    def supersede(self) -> None:
        """End the stream because newer input has come: its readers stop without an error.

        The text that had arrived stays in `text_so_far`; `completed` tells whether it is whole.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         stream = await client.caption(md.SAMPLE_IMAGE, stream=True)
        ...         stream.supersede()
        ...         return [piece async for piece in stream.chunk]
        >>> asyncio.run(main())
        []
        """
        self._close(SUPERSEDED)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} can't be copied: it is one connection, read once")
