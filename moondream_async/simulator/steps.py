"""The types that the parts of the simulator exchange: answers, replies, steps and routes.

A skill or a script makes an `Answer`. A dialect words the answer: as the body of one
`Reply`, or as a row of `Event` steps. A fault makes that row worse. The server alone
carries steps out: it writes, waits and hangs up.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from .received import ReceivedRequest

Body = dict[str, Any]


class Answer(msgspec.Struct, kw_only=True):
    """A whole answer, before a dialect words it."""

    skill: str
    result: Body
    """The fields that the skill adds to a body, as ``{"caption": "A red circle."}``."""
    pieces: list[str] = []
    """The pieces of a stream, a token each: the words of a text, or of a coarse path."""
    piece_by_piece: bool = False
    """Each piece is an event, also in a dialect that puts several into one."""
    finish_reason: str = "stop"
    reasoning: Body | None = None
    input_tokens: int = 735
    """Of the question and the picture; a picture counts as 729, as in the model."""
    number: int = 0
    """Counts the answers of one server, from 1."""
    received: float = 0.0
    """When the request came in, by `time.perf_counter`."""
    ready: float = 0.0
    """When the answer was found."""

    @property
    def tokens(self) -> int:
        """How many tokens a model would have written: a word each, or a number of a place."""
        places = self.result.get("objects") or self.result.get("points") or ()
        return len(self.pieces) + sum(map(len, places))

    def fields(self) -> Body:
        """Return the fields that the skill adds to a body, with the reasoning if there is one."""
        thought = {} if self.reasoning is None else {"reasoning": self.reasoning}
        return self.result | thought

    def usage(self) -> Body:
        """Return the counts of tokens."""
        return {"input_tokens": self.input_tokens, "output_tokens": self.tokens}

    def metrics(self) -> Body:
        """Return counts, and the times up to now, in the words of the API."""
        prefill = round((self.ready - self.received) * 1000, 3)
        decode = round((time.perf_counter() - self.ready) * 1000, 3)
        times = {"prefill_time_ms": prefill, "decode_time_ms": decode, "ttft_ms": prefill}
        return self.usage() | times


def say(skill: str, key: str, text: str, limit: int | None = None) -> Answer:
    """Return an answer in words, cut after `limit` of them."""
    words = split_words(text)
    kept = words[:limit]
    ended = "stop" if len(kept) == len(words) else "length"
    return Answer(skill=skill, result={key: "".join(kept)}, pieces=kept, finish_reason=ended)


def split_words(text: str) -> list[str]:
    """Split a text into pieces as a model writes them: a word with the space before it.

    >>> split_words("A red circle.")
    ['A', ' red', ' circle.']
    """
    return re.findall(r"\s*\S+|\s+", text)


class Reply(msgspec.Struct, frozen=True):
    """A whole response of HTTP."""

    status: int = 200
    body: str | bytes | Body | None = None
    """JSON if it is a dict; None is the dialect's own error body for the status."""
    headers: dict[str, str] = {}
    content_type: str = "text/plain"
    """Of a body that is text or bytes."""


class Event(msgspec.Struct, frozen=True):
    """Send these bytes, in one write."""

    data: bytes
    tokens: int = 0
    """The tokens in the bytes: the server's rate says how long they take."""
    last: bool = False
    """Whether the answer is complete at this event."""


class Wait(msgspec.Struct, frozen=True):
    """Send nothing for so many seconds; None is until the client goes away."""

    seconds: float | None


class Hold(msgspec.Struct, frozen=True):
    """Send nothing until `released` is true; it is called again at every change."""

    released: Callable[[], bool]


class HangUp(msgspec.Struct, frozen=True):
    """Close the connection in the middle of the body, in good order or with a TCP reset."""

    reset: bool = False


Step = Event | Wait | Hold | HangUp
Steps = Iterator[Step]
Found = Reply | Body | Steps
Endpoint = Callable[["ReceivedRequest"], Found | Awaitable[Found]]
"""Returns the body of a reply, a whole reply or a stream, or raises `RefusedError`."""

Auth = Literal["key", "bearer", "optional", "none"]
"""Which header must hold the key: X-Moondream-Auth; that or Authorization; Authorization if any."""


class Route(msgspec.Struct, frozen=True):
    """Which requests an endpoint answers."""

    method: str
    path: str
    """As aiohttp writes paths: ``/v1/batch/{id}``."""
    endpoint: Endpoint
    auth: Auth = "key"
    skill: str = ""
    """The skill that a script answers for here, if any."""


class _Counted(Protocol):
    @property
    def times(self) -> int | None: ...


QueuedT = TypeVar("QueuedT", bound=_Counted)


class Queue(Generic[QueuedT]):
    """A queue of answers or faults for later requests. It may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[QueuedT] = []

    def _add(self, queued: QueuedT) -> None:
        with self._lock:
            self._waiting.append(queued)

    def clear(self) -> None:
        """Remove all items."""
        with self._lock:
            self._waiting.clear()

    @property
    def unused(self) -> list[QueuedT]:
        """The items that no request has taken, without the items for any number of requests."""
        return [queued for queued in self if queued.times is not None]

    def __iter__(self) -> Iterator[QueuedT]:
        return iter(tuple(self._waiting))

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._waiting})"
