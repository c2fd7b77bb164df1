"""What comes out: answers, the events of streams, and what is known of a server. Frozen values.

Results are read by attribute or by item, with the keys of the official SDK:
``result.caption == result["caption"]``. Each carries `raw`, the decoded body,
so that nothing the server sent is lost.

Coordinates are 0-1 of the picture's width and height, from the top left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from .types import ImageInput

if TYPE_CHECKING:
    import PIL.Image


class Value(msgspec.Struct, frozen=True):
    """Attribute and item access to the same fields."""

    def __getitem__(self, key: str) -> Any:
        if key in self.__struct_fields__:
            return getattr(self, key)
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return key in self.__struct_fields__

    def __iter__(self) -> Iterator[str]:
        return iter(self.__struct_fields__)

    def keys(self) -> tuple[str, ...]:
        """Return the names of the fields, so that ``dict(value)`` works."""
        return self.__struct_fields__

    def get(self, key: str, default: Any = None) -> Any:
        """Return the field `key`, or `default` where there is none or it is None."""
        value = getattr(self, key, None) if key in self.__struct_fields__ else None
        return default if value is None else value


class Point(Value, frozen=True):
    """A place in the picture."""

    x: float
    y: float

    def to_pixels(self, width: int, height: int) -> tuple[float, float]:
        """Return x and y in pixels, for a picture of that size.

        >>> Point(0.5, 0.25).to_pixels(640, 480)
        (320.0, 120.0)
        """
        return self.x * width, self.y * height


class Region(Value, frozen=True):
    """A box in the picture."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    def to_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels, for a picture of that size.

        In the order that Pillow's ``crop`` and ``rectangle`` take.

        >>> Region(0.25, 0.5, 0.75, 1).to_pixels(640, 480)
        (160.0, 240.0, 480.0, 480)
        """
        return self.x_min * width, self.y_min * height, self.x_max * width, self.y_max * height


SpatialRefs = Sequence[Point | Region | Sequence[float]]
"""Places in a picture: points ``[x, y]``, boxes ``[x_min, y_min, x_max, y_max]``, or what other
calls found."""


class Grounding(Value, frozen=True):
    """A span of the reasoning's text and the places in the picture that it speaks of."""

    start_idx: int
    """Characters into the reasoning's text."""
    end_idx: int
    points: tuple[tuple[float, ...], ...] = ()


class Reasoning(Value, frozen=True):
    """What the model thought before it answered."""

    text: str
    grounding: tuple[Grounding, ...] = ()


class Result(Value, frozen=True, kw_only=True):
    """What every answer has."""

    request_id: str | None = None
    """The server's id for the request; Station gives none."""
    finish_reason: str | None = None
    """``stop``, or ``length`` when the answer was cut at `max_tokens`."""
    metrics: dict[str, Any] | None = None
    """Tokens and times, under the server's own names."""
    raw: dict[str, Any] = {}
    """The decoded body, whole."""

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__struct_fields__
            if name != "raw" and getattr(self, name) is not None
        )
        return f"{type(self).__name__}({fields})"


class CaptionResult(Result, frozen=True, kw_only=True):
    """A description of a picture."""

    caption: str


class _Drawable(Result, frozen=True, kw_only=True):
    """A result that knows places in its picture."""

    def draw(
        self,
        image: ImageInput,
        *,
        labels: str | Sequence[str] | None = None,
        line_width: float | None = None,
    ) -> PIL.Image.Image:
        """Return a copy of the picture, upright, with what was found drawn over it.

        Each box, point, outline or span of the reasoning has a colour of its own. It
        takes some tenths of a second; in an event loop, use
        ``await asyncio.to_thread(result.draw, image)``.

        Args:
            image: The picture, in any form that calls take.
            labels: What to write at each: one text for all, or as many as there are.
                None writes the words that the reasoning has for a place, if any.
            line_width: In pixels; None is what suits the picture's size.

        Raises:
            ImageError: The picture can't be read.
            RequestError: There are more or fewer labels than places; the server sent an
                outline that is no SVG path, or without its `bbox`.
            ImportError: An outline needs the extra ``draw``, and it isn't there.
        """
        # The one import that goes up: whoever calls this has Pillow, and no one else needs it.
        from ._draw import draw  # noqa: PLC0415 - importing the package stays light

        return draw(self, image, labels=labels, line_width=line_width)


class QueryResult(_Drawable, frozen=True, kw_only=True):
    """An answer about a picture. What is drawn are the places that its reasoning speaks of."""

    answer: str
    reasoning: Reasoning | None = None
    """Present when the call asked for it and the server gave it."""


class DetectResult(_Drawable, frozen=True, kw_only=True):
    """Where in the picture the objects are."""

    objects: tuple[Region, ...]
    """A box each."""


class PointResult(_Drawable, frozen=True, kw_only=True):
    """Where in the picture the objects are."""

    points: tuple[Point, ...]
    """A place in each."""


class SegmentResult(_Drawable, frozen=True, kw_only=True):
    """The outline of an object."""

    path: str
    """SVG path data. Its coordinates are 0-1 of `bbox`, not of the picture."""
    bbox: Region | None = None
    """Where the object is; some servers leave it out."""
    parse_error: str | None = None
    """What was wrong with the outline that the model wrote, in the server's words."""

    @property
    def transform(self) -> str | None:
        """The SVG transform that puts `path` in its place, in 0-1 of the picture.

        None where the server gave no `bbox`.
        """
        return None if self.bbox is None else _transform(self.bbox)

    def whole_path(self) -> str | None:
        """Return SVG path data whose coordinates are 0-1 of the picture, not of `bbox`.

        None where the server gave no `bbox`. Arcs become short lines.

        Raises:
            RequestError: The server sent an outline that is no SVG path.
            ImportError: The extra ``draw`` isn't there.
        """
        if self.bbox is None:
            return None
        from ._draw import whole_path  # noqa: PLC0415 - as for `draw`

        return whole_path(self.path, self.bbox)


def _transform(bbox: Region) -> str:
    width, height = bbox.x_max - bbox.x_min, bbox.y_max - bbox.y_min
    return f"translate({bbox.x_min:.9g} {bbox.y_min:.9g}) scale({width:.9g} {height:.9g})"


class ChatMessage(Value, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: str
    content: str
    reasoning: str | None = None
    """What the model thought, where the server says it."""


class Usage(Value, frozen=True, kw_only=True):
    """How many tokens a chat took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


class ChatResult(Result, frozen=True, kw_only=True):
    """The next turn of a conversation."""

    message: ChatMessage
    reasoning: Reasoning | None = None
    """What the model thought, with the places that it speaks of, where the server says so."""
    usage: Usage | None = None


class Model(Value, frozen=True, kw_only=True):
    """A model that a server offers."""

    id: str
    name: str | None = None
    description: str | None = None
    version: str | None = None
    raw: dict[str, Any] = {}
    """The whole entry."""


class Health(Value, frozen=True, kw_only=True):
    """How a server says that it is."""

    ok: bool
    """Whether it takes requests."""
    status: str
    """In its own words, as ``ok`` or ``starting``."""
    raw: dict[str, Any] = {}
    """The decoded body, whole."""


class ServerStats(Value, frozen=True, kw_only=True):
    """How busy a Moondream Station is."""

    status: str | None = None
    model: str | None = None
    workers: int | None = None
    queue_size: int | None = None
    max_queue_size: int | None = None
    processing: int | None = None
    timeouts: int | None = None
    default_timeout: float | None = None
    """Seconds."""
    requests_processed: int | None = None
    raw: dict[str, Any] = {}
    """The decoded body, whole."""


class ClientStats(Value, frozen=True, kw_only=True):
    """What a client is doing and has done, over all its event loops."""

    open_streams: int
    """Streams and plain calls that hold one of the `max_connections` places."""
    waiting_calls: int
    """Calls that wait for one."""
    pooled_connections: int
    """Connections that are open and idle. Those of a caller's own session don't count."""
    requests: int
    """Requests sent, retries included."""
    retries: int
    bytes_sent: int
    """Of bodies."""
    bytes_received: int
    """Of bodies that have ended."""


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the base of all of them."""

    raw: dict[str, Any]
    """The decoded event, whole."""
    chunk: str = ""
    """The piece of text that this event adds to the answer, mostly "" but in a `ChunkEvent`."""


class ChunkEvent(StreamEvent, frozen=True, kw_only=True):
    """The next piece of the answer."""


class ReasoningEvent(StreamEvent, frozen=True, kw_only=True):
    """The next piece of what the model thinks."""

    text: str


class BboxEvent(StreamEvent, frozen=True, kw_only=True):
    """Where the object is whose outline follows."""

    bbox: Region


class MetricsEvent(StreamEvent, frozen=True, kw_only=True):
    """Counts and times beside the answer: Station's ``stats``, chat's ``usage``."""

    metrics: dict[str, Any]


class FinalEvent(StreamEvent, frozen=True, kw_only=True):
    """The answer is complete. `chunk` is its last piece, where the server sends it here."""


class UnknownEvent(StreamEvent, frozen=True, kw_only=True):
    """An event of a kind that this version does not know."""

    event: str
    """The name that the server gave it: its ``type``, its SSE event name, or ``message``."""


class Record(Value, frozen=True, kw_only=True):
    """What the server keeps, as it was when it was asked."""

    raw: dict[str, Any] = msgspec.field(default_factory=dict)
    """The decoded record, whole."""

    _hidden: ClassVar[tuple[str, ...]] = ("raw",)  # from repr

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__struct_fields__
            if name not in self._hidden and getattr(self, name) is not None
        )
        return f"{type(self).__name__}({fields})"


BASE_MODEL = "moondream3-preview"
"""What finetunes are made from where nothing else is said (the official SDK's word)."""
