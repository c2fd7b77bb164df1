"""The parts that a stream is made of: its source of bytes, its beginning, its observer."""

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
        """Return the next bytes.

        Raises:
            StopAsyncIteration: The body ended as it should.
            APIConnectionError: The connection broke; all bytes before that were returned.
            ClientClosedError: The client closed it.
        """

    def close(self) -> None:
        """Drop the connection at once, from any thread; a waiting reader gets an error.

        Closing twice does no harm.
        """

    async def finish(self) -> None:
        """Wait for a short time for the end of a body whose answer is complete.

        At its end, the connection can be used for the next request.
        """

    @property
    def closed(self) -> bool:
        """Whether the connection was given back to the pool or dropped."""


class Opening(NamedTuple):
    """The beginning of a stream; another attempt before the first event makes another one."""

    decoder: AnswerDecoder
    source: ByteSource | None = None  # None if the whole answer is in `events`
    events: Block = NOTHING
    sent_at: float | None = None  # on the loop's clock
    waited: float = 0.0  # seconds of `Timeout.first_event` that are over
    headers: Mapping[str, str] = {}  # of the response


Reopen = Callable[[MoondreamError], Awaitable[Opening]]
"""Takes the error of a lost attempt; returns the next attempt, or raises that error."""


class Observer(Protocol):
    """Is notified of what happens to a stream."""

    def first_chunk(self, request_id: str | None) -> None:
        """The first piece of text has arrived."""

    def chunks(self, texts: Sequence[str]) -> None:
        """A block of events has arrived, with these pieces of text; some may be empty."""

    @property
    def wants_answer(self) -> bool:
        """Whether `ended` needs `answer`, the whole text."""

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
        """The stream was read to the end, failed, was closed or dropped; from any thread."""
