"""What a stream starts from, what it reads from, and whom it tells of its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from moondream_async._protocol.chunks import NOTHING, Block
from moondream_async._protocol.events import AnswerDecoder
from moondream_async.errors import MoondreamError
from moondream_async.results import Usage


class ByteSource(Protocol):
    """Where the bytes of one stream come from."""

    async def __anext__(self) -> bytes:
        """Return the next bytes; StopAsyncIteration at the clean end.

        Raises:
            APIConnectionError: The connection broke. Whatever had arrived before
                was returned first.
            ClientClosedError: The client closed it.
        """

    def close(self) -> None:
        """Drop the connection now, from any thread; a waiting reader is woken with an error.

        Closing twice does nothing.
        """

    async def finish(self) -> None:
        """Wait, shortly, for the end of a body whose events are complete.

        So the connection can be used for the next request.
        """

    @property
    def closed(self) -> bool:
        """Whether the connection was given back or dropped."""


class Opening(NamedTuple):
    """What a stream starts from, and starts from again when a try fails before its first event."""

    decoder: AnswerDecoder
    source: ByteSource | None = None  # None: the whole answer is in `events`
    events: Block = NOTHING
    sent_at: float | None = None  # on the loop's clock
    waited: float = 0.0  # seconds already spent on waiting for the first event
    headers: Mapping[str, str] = {}  # of the response


Reopen = Callable[[MoondreamError], Awaitable[Opening]]
"""Takes a failure before the first event; returns the next try, or raises it."""


class Observer(Protocol):
    """Is told what becomes of a stream."""

    def first_chunk(self, request_id: str | None) -> None:
        """The first piece of text is there."""

    def chunks(self, texts: Sequence[str]) -> None:
        """Events have arrived together, with these pieces of text; some may be empty."""

    @property
    def wants_answer(self) -> bool:
        """Whether `ended` is to be given all of the text."""

    def ended(
        self,
        *,
        error: BaseException | None = None,
        completed: bool = False,
        request_id: str | None = None,
        finish_reason: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        usage: Usage | None = None,
        ttft: float | None = None,
        answer: str | None = None,
    ) -> None:
        """It was read to the end, failed, was closed, or was dropped; from any thread."""
