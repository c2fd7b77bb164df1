"""What comes out: answers, the events of streams, and the state of a server.

Results are dictionaries whose items can be read as attributes too, with the keys of the
official SDK: ``result.caption == result["caption"]``. A result goes wherever a plain dict
goes: to `json`, into a web framework, into a table. A value that the server left out is no
key, and None as an attribute. `raw` (the decoded body) and `headers` (the response's) are
attributes and no keys: they keep all that the server sent, and are not passed on with the items.

- Items can be changed and added, as in any dict. Attributes can't be set.
- Like dicts, results are equal if their items are, also to plain dicts, and can't be hashed.
- ``result | {...}`` and ``result.copy()`` are plain dicts; `copy` and `pickle` keep the type,
  `raw` and `headers`.
- A result is made of keywords, or like a dict of a mapping, which may have further keys.

Coordinates are 0-1 of the picture's width and height, from the top left.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec

from ._values import Item_co, Key_contra, OtherItem_co, OtherKey_contra, Record, Value
from .types import ImageInput

if TYPE_CHECKING:
    import PIL.Image


class Point(Value[Literal["x", "y"], float]):
    """A point in the picture, in 0-1 of its width and height.

    >>> point = Point(0.5, 0.25)
    >>> point.x, point["y"], point
    (0.5, 0.25, Point(x=0.5, y=0.25))
    """

    __slots__ = ()

    x: float
    y: float

    def to_pixels(self, width: int, height: int) -> tuple[float, float]:
        """Return x and y in pixels, for a picture of `width` x `height`.

        >>> Point(0.5, 0.25).to_pixels(640, 480)
        (320.0, 120.0)
        """
        return self.x * width, self.y * height


class Region(Value[Literal["x_min", "y_min", "x_max", "y_max"], float]):
    """A box in the picture, in 0-1 of its width and height.

    >>> box = Region(0.25, 0.5, 0.75, 1)
    >>> box.x_max - box["x_min"]
    0.5
    """

    __slots__ = ()

    x_min: float
    y_min: float
    x_max: float
    y_max: float

    def to_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels, for a picture of `width` x `height`.

        Pillow's ``crop`` and ``rectangle`` take this order.

        >>> Region(0.25, 0.5, 0.75, 1).to_pixels(640, 480)
        (160.0, 240.0, 480.0, 480)
        """
        return self.x_min * width, self.y_min * height, self.x_max * width, self.y_max * height


SpatialRefs = Sequence[Point | Region | Sequence[float]]
"""Places in a picture: points ``[x, y]``, boxes ``[x_min, y_min, x_max, y_max]``, or the points
and boxes that other calls found."""


class Grounding(Value[Literal["start_idx", "end_idx"], int, Literal["points"], list[list[float]]]):
    """A span of the reasoning's text, and the points in the picture that this text is about.

    >>> Grounding(0, 3, [[0.5, 0.25]]).points
    [[0.5, 0.25]]
    """

    __slots__ = ()

    start_idx: int
    """The index of the span's first character; `end_idx` is the index after its last one."""
    end_idx: int
    points: list[list[float]] = msgspec.field(default_factory=list)


class Reasoning(Value[Literal["text"], str, Literal["grounding"], list[Grounding]]):
    """What the model thought before it answered.

    >>> Reasoning("Two.", [Grounding(0, 3, [[0.5, 0.25]])]).text
    'Two.'
    """

    __slots__ = ()

    text: str
    grounding: list[Grounding] = msgspec.field(default_factory=list)


class Usage(
    Value[Literal["prompt_tokens", "completion_tokens", "total_tokens"], int], kw_only=True
):
    """How many tokens a chat took.

    >>> Usage(prompt_tokens=7).total_tokens is None  # the server left it out
    True
    """

    __slots__ = ()

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Result(Value[Key_contra, Item_co, OtherKey_contra, OtherItem_co], kw_only=True):
    """What every answer has.

    >>> result = CaptionResult(caption="a heron", finish_reason="stop")
    >>> isinstance(result, Result), result.request_id, result.get("request_id", "unknown")
    (True, None, 'unknown')
    """

    __slots__ = ("_headers", "_picture", "_raw")
    _beside = frozenset({"raw", "headers"})

    request_id: str | None = None
    """The server's id for the request; Station gives none."""
    finish_reason: str | None = None
    """``stop``, or ``length`` when the answer was cut at `max_tokens`."""
    metrics: dict[str, Any] | None = None
    """Tokens and times, under the server's own names."""
    raw: dict[str, Any] = msgspec.field(default_factory=dict)
    """The decoded body, whole. No key."""
    headers: Mapping[str, str] | None = None
    """The response's headers; their names may be written in upper or lower case. No key; None
    where the result came without a response of its own, as in a file of results."""

    if TYPE_CHECKING:

        @overload  # type: ignore[override] # to a checker, a dict takes any key
        def __getitem__(self, key: Literal["request_id", "finish_reason"], /) -> str: ...
        @overload
        def __getitem__(self, key: Literal["metrics"], /) -> dict[str, Any]: ...
        @overload
        def __getitem__(self, key: Key_contra, /) -> Item_co: ...
        @overload
        def __getitem__(self, key: OtherKey_contra, /) -> OtherItem_co: ...
        def __getitem__(self, key: Any, /) -> Any: ...


class CaptionResult(Result[Literal["caption"], str], kw_only=True):
    """A description of a picture.

    >>> result = CaptionResult(caption="a heron")
    >>> result.caption == result["caption"], result
    (True, CaptionResult(caption='a heron'))
    """

    __slots__ = ()

    caption: str


class _Drawable(Result[Key_contra, Item_co, OtherKey_contra, OtherItem_co], kw_only=True):
    """A result with places in its picture."""

    __slots__ = ()

    def __init_subclass__(cls, *, kw_only: bool = False) -> None:
        super().__init_subclass__(kw_only=kw_only)
        type.__setattr__(cls, "draw", _Drawable.draw)  # so that the reference lists it

    def _repr_html_(self) -> str | None:
        """Return the picture with marks, and the answer below it, for a notebook."""
        picture = self._repr_png_()
        if picture is None:
            return None
        from base64 import b64encode  # noqa: PLC0415 - only notebooks call this
        from html import escape  # noqa: PLC0415 - likewise

        source = f"data:image/png;base64,{b64encode(picture).decode()}"
        return f'<img src="{source}"><br><code>{escape(repr(self))}</code>'

    def _repr_png_(self) -> bytes | None:
        """Return the picture with marks, for a notebook; None where the picture is not known."""
        image = getattr(self, "_picture", None)
        image = image() if isinstance(image, weakref.ref) else image
        if image is None:
            return None
        from ._draw import preview  # noqa: PLC0415 - as for `draw`

        return preview(self, image)

    def draw(
        self,
        image: ImageInput,
        *,
        labels: str | Sequence[str] | None = None,
        line_width: float | None = None,
    ) -> PIL.Image.Image:
        """Return a copy of the picture, upright, with what was found drawn over it.

        Each box, point, outline or span of the reasoning has a colour of its own. Drawing
        takes some tenths of a second; in an event loop, use
        ``await asyncio.to_thread(result.draw, image)``.

        Args:
            image: The picture, in any form that calls take.
            labels: The text at each place: one for all, or a text for each. None writes
                the reasoning's words for a place, if any.
            line_width: In pixels; None chooses one for the picture's size.

        Raises:
            ImageError: The picture can't be read.
            RequestError: There are more or fewer labels than places; the server sent an
                outline that is no SVG path, or without its `bbox`.
            ImportError: An outline needs the extra ``draw``, which is not installed.

        >>> DetectResult(objects=[Region(0, 0, 0.5, 1)]).draw(md.SAMPLE_IMAGE, labels="left").size
        (640, 480)
        """
        # The one import from a room above: results do without Pillow until they are drawn.
        from ._draw import draw  # noqa: PLC0415 - importing the package stays light

        return draw(self, image, labels=labels, line_width=line_width)


class QueryResult(_Drawable[Literal["answer"], str, Literal["reasoning"], Reasoning], kw_only=True):
    """An answer about a picture. `draw` marks the places that the reasoning is about.

    >>> QueryResult(answer="two", reasoning=Reasoning("One and one.")).reasoning.text
    'One and one.'
    """

    __slots__ = ()

    answer: str
    reasoning: Reasoning | None = None
    """None where the call did not ask for it, or the server gave none."""


class DetectResult(_Drawable[Literal["objects"], list[Region]], kw_only=True):
    """Where in the picture the objects are.

    >>> result = DetectResult(objects=[Region(0, 0, 0.5, 1)])
    >>> [box.to_pixels(640, 480) for box in result.objects]
    [(0, 0, 320.0, 480)]
    """

    __slots__ = ()

    objects: list[Region]
    """One box for each object."""


class PointResult(_Drawable[Literal["points"], list[Point]], kw_only=True):
    """Where in the picture the objects are.

    >>> [point.x for point in PointResult(points=[Point(0.5, 0.25)]).points]
    [0.5]
    """

    __slots__ = ()

    points: list[Point]
    """One point in each object."""


class SegmentResult(
    _Drawable[Literal["path", "parse_error"], str, Literal["bbox"], Region], kw_only=True
):
    """The outline of an object.

    >>> SegmentResult(path="M 0 0 H 1 V 1 H 0 Z", bbox=Region(0.5, 0, 1, 0.5)).transform
    'translate(0.5 0) scale(0.5 0.5)'
    """

    __slots__ = ()

    path: str
    """SVG path data. Its coordinates are 0-1 of `bbox`, not of the picture."""
    bbox: Region | None = None
    """Where the object is; some servers leave it out."""
    parse_error: str | None = None
    """What was wrong with the outline that the model wrote, in the server's words."""

    @property
    def transform(self) -> str | None:
        """The SVG transform from the coordinates of `path` to 0-1 of the picture.

        None where the server gave no `bbox`.
        """
        return None if self.bbox is None else _transform(self.bbox)

    def to_mask(self, width: int, height: int) -> PIL.Image.Image:
        """Return what lies inside the outline as a mask: white on black, `width` x `height` pixels.

        The mask is a Pillow image of mode ``1``; ``numpy.asarray(mask)`` is an array of bools,
        of the shape (height, width). A mask of several megapixels takes up to a second. Where
        nothing was found, it is black.

        Raises:
            RequestError: The server sent an outline that is no SVG path, or without its
                `bbox`; a side is no whole number over 0, or the mask would be larger than
                any picture that is read.
            ImportError: The extra ``draw`` is not installed.

        >>> outline = SegmentResult(path="M 0 0 H 1 V 1 H 0 Z", bbox=Region(0.5, 0, 1, 1))
        >>> mask = outline.to_mask(4, 2)
        >>> [mask.getpixel((x, 0)) for x in range(4)]
        [0, 0, 255, 255]
        """
        from ._draw import mask  # noqa: PLC0415 - as for `draw`

        return mask(self.path, self.bbox, (width, height))

    def whole_path(self) -> str | None:
        """Return SVG path data whose coordinates are 0-1 of the picture, not of `bbox`.

        None where the server gave no `bbox`. Arcs become short lines.

        Raises:
            RequestError: The server sent an outline that is no SVG path.
            ImportError: The extra ``draw`` is not installed.

        >>> SegmentResult(path="M 0 0 L 1 1 Z", bbox=Region(0.5, 0, 1, 1)).whole_path()
        'M 0.5,0 L 1,1 Z'
        """
        if self.bbox is None:
            return None
        from ._draw import whole_path  # noqa: PLC0415 - as for `draw`

        return whole_path(self.path, self.bbox)


def _transform(bbox: Region) -> str:
    width, height = bbox.x_max - bbox.x_min, bbox.y_max - bbox.y_min
    return f"translate({bbox.x_min:.9g} {bbox.y_min:.9g}) scale({width:.9g} {height:.9g})"


def remember_picture(result: Result, image: Any) -> None:
    """Remember a result's picture for notebooks, without keeping a picture in memory.

    A path is kept; a Pillow image or an array is referred to weakly. Bytes and files are not
    remembered: they have no weak references.
    """
    if isinstance(image, (str, PurePath)) and not str(image).startswith("data:"):
        setattr(result, "_picture", image)  # noqa: B010 - no field, to type checkers
    elif image is not None and type(image).__weakrefoffset__:
        setattr(result, "_picture", weakref.ref(image))  # noqa: B010 - likewise


class ChatMessage(
    Value[Literal["role", "content", "reasoning"], str, Literal["reasoning_details"], Reasoning],
    kw_only=True,
):
    """One turn of a conversation.

    >>> ChatMessage(role="assistant", content="Two.").content
    'Two.'
    """

    __slots__ = ()

    role: str
    content: str
    reasoning: str | None = None
    """What the model thought; None where the server leaves it out."""
    reasoning_details: Reasoning | None = None
    """The same with the places in the pictures that it is about; likewise."""


class ChatResult(Result[Literal["message"], ChatMessage, Literal["usage"], Usage], kw_only=True):
    """The next turn of a conversation.

    >>> ChatResult(message=ChatMessage(role="assistant", content="Two.")).message.role
    'assistant'
    """

    __slots__ = ()

    message: ChatMessage
    usage: Usage | None = None

    @property
    def reasoning(self) -> Reasoning | None:
        """What the model thought, taken from the `message`."""
        said = self.message
        return said.reasoning_details or (Reasoning(said.reasoning) if said.reasoning else None)


class Model(Record[Literal["id", "name", "description", "version"], str], kw_only=True):
    """A model that a server offers."""

    __slots__ = ()

    id: str
    name: str | None = None
    description: str | None = None
    version: str | None = None


class Health(Record[Literal["ok"], bool, Literal["status"], str], kw_only=True):
    """The state that a server reports of itself."""

    __slots__ = ()

    ok: bool
    """Whether the server takes requests."""
    status: str
    """The server's own word, as ``ok`` or ``starting``."""


_Requests = Literal["queue_size", "max_queue_size", "processing", "requests_processed"]
_Numbers = Literal["workers", "timeouts", "default_timeout"]


class ServerStats(
    Record[Literal["status", "model"], str, _Requests | _Numbers, float], kw_only=True
):
    """How busy a Moondream Station is."""

    __slots__ = ()

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


_Now = Literal["open_streams", "waiting_calls", "pooled_connections"]
_SoFar = Literal["requests", "retries", "bytes_sent", "bytes_received"]


class ClientStats(Value[_Now | _SoFar, int], kw_only=True):
    """What a client is doing and has done, over all its event loops."""

    __slots__ = ()

    open_streams: int
    """Streams and plain calls that hold one of the `max_connections` connection slots."""
    waiting_calls: int
    """Calls that wait for a connection slot."""
    pooled_connections: int
    """Connections that are open and idle; those of a caller's own session are not counted."""
    requests: int
    """Requests sent, retries included."""
    retries: int
    bytes_sent: int
    """The bytes of all requests' bodies."""
    bytes_received: int
    """The bytes of all answers' bodies that have ended."""


class StreamEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; the base of all of them.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         stream = await client.caption(md.SAMPLE_IMAGE, "short", stream=True)
    ...         return [type(event).__name__ async for event in stream.events][-1]
    >>> asyncio.run(main())
    'FinalEvent'
    """

    raw: dict[str, Any]
    """The decoded event, whole."""
    chunk: str = ""
    """The piece of text that this event adds to the answer; mostly "", except in a `ChunkEvent`."""


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
    """The answer is complete. `chunk` is its last piece; "" where that came before."""


class UnknownEvent(StreamEvent, frozen=True, kw_only=True):
    """An event of a kind that this version does not know."""

    event: str
    """The name that the server gave it: its ``type``, its SSE event name, or ``message``."""


BASE_MODEL = "moondream3-preview"
"""The model from which finetunes are made by default, as in the official SDK."""
