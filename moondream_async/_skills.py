"""The calls: what a client can ask a server for.

Each call checks its arguments and makes a `Request`; the `Caller` sends it, and retries.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from ._protocol.requests import (
    Request,
    caption_request,
    chat_request,
    detect_request,
    point_request,
    query_request,
    segment_request,
)
from ._stream.call import AnyStream, StreamCall
from ._stream.kinds import CaptionStream, ChatStream, QueryStream, SegmentStream
from .results import (
    CaptionResult,
    ChatMessage,
    ChatResult,
    DetectResult,
    PointResult,
    QueryResult,
    SegmentResult,
    SpatialRefs,
    remember_picture,
)
from .types import EncodedImage, ImageInput, Length, Settings

if TYPE_CHECKING:
    from ._call.call import Caller

_MethodT = TypeVar("_MethodT", bound=Callable[..., Any])

Messages = Sequence[Mapping[str, Any] | ChatMessage]


def _awaited(method: _MethodT) -> _MethodT:
    """Mark a method as one to await, for tools that inspect functions.

    The method is no ``async def``, since with ``stream=True`` its value can be entered, too.
    """
    mark = getattr(inspect, "markcoroutinefunction", None)  # of Python 3.12
    return method if mark is None else mark(method)


class Skills:
    """The calls of `MoondreamClient`."""

    _caller: Caller
    _model: str | None

    def __init_subclass__(cls) -> None:
        if Skills in cls.__bases__:  # so that a reference lists the calls as the client's
            for name, call in [each for base in cls.__bases__ for each in vars(base).items()]:
                if not name.startswith("_"):
                    setattr(cls, name, call)

    @overload
    def caption(
        self,
        image: ImageInput,
        length: Length = "normal",
        stream: Literal[False] = False,
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, CaptionResult]: ...

    @overload
    def caption(
        self,
        image: ImageInput,
        length: Length = "normal",
        *,
        stream: Literal[True],
        settings: Settings | None = None,
        model: str | None = None,
    ) -> StreamCall[CaptionStream]: ...

    @overload
    def caption(
        self,
        image: ImageInput,
        length: Length,
        stream: Literal[True],
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> StreamCall[CaptionStream]: ...

    @overload
    def caption(
        self,
        image: ImageInput,
        length: Length = "normal",
        *,
        stream: bool,
        settings: Settings | None = None,
        model: str | None = None,
    ) -> Coroutine[Any, Any, CaptionResult | CaptionStream]: ...

    @_awaited
    def caption(
        self,
        image: ImageInput,
        length: Length = "normal",
        stream: bool = False,
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, CaptionResult] | StreamCall[CaptionStream]:
        """Describe a picture.

        Args:
            image: A path, bytes, an open binary file, a PIL image, or a result of
                `encode_image`.
            length: ``short``, ``normal`` or ``long``.
            stream: Whether to return a stream of the description as it is written.
            settings: Sampling settings; see `Settings`.
            model: A model in place of the client's.

        Returns:
            A `CaptionResult`; with ``stream=True`` a `CaptionStream`, as soon as the
            server has accepted the request. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument is wrong; nothing was sent.
            ImageError: The picture can't be read; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or during the call.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.caption(md.SAMPLE_IMAGE, length="short")
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return result.caption == await stream.text()
        >>> asyncio.run(main())
        True
        """
        request = partial(caption_request, image, length=length, stream=stream, settings=settings)
        if stream is True:
            return StreamCall(self._stream(CaptionStream, request, model, _caller_line()))
        return self._result(request, model, image)

    @overload
    def query(
        self,
        image: ImageInput | None = None,
        question: str | None = None,
        stream: Literal[False] = False,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, QueryResult]: ...

    @overload
    def query(
        self,
        image: ImageInput | None = None,
        question: str | None = None,
        *,
        stream: Literal[True],
        settings: Settings | None = None,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        model: str | None = None,
    ) -> StreamCall[QueryStream]: ...

    @overload
    def query(
        self,
        image: ImageInput | None,
        question: str | None,
        stream: Literal[True],
        settings: Settings | None = None,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        *,
        model: str | None = None,
    ) -> StreamCall[QueryStream]: ...

    @overload
    def query(
        self,
        image: ImageInput | None = None,
        question: str | None = None,
        *,
        stream: bool,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        model: str | None = None,
    ) -> Coroutine[Any, Any, QueryResult | QueryStream]: ...

    @_awaited
    def query(
        self,
        image: ImageInput | None = None,
        question: str | None = None,
        stream: bool = False,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, QueryResult] | StreamCall[QueryStream]:
        """Answer a question about a picture, or, if the server can, without a picture.

        Args:
            image: As for `caption`.
            question: The question.
            stream: Whether to return a stream of the answer as it is written.
            reasoning: Whether the model thinks first; None leaves it to the server. From
                a server that can't stream with reasoning, the answer comes in one piece.
            spatial_refs: The places that the question is about: points ``[x, y]`` and
                boxes ``[x_min, y_min, x_max, y_max]``, in 0-1 of the picture, or results
                of `point` and `detect`.
            settings: Sampling settings; see `Settings`.
            model: A model in place of the client's.

        Returns:
            A `QueryResult`; with ``stream=True`` a `QueryStream`, as soon as the server
            has accepted the request. Cancelling the call drops its connection.

        Raises:
            MoondreamError: The same errors as `caption`.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.query(md.SAMPLE_IMAGE, "How many?", reasoning=True)
        ...         return result.answer, result.reasoning.text
        >>> answer, thoughts = asyncio.run(main())
        """
        request = partial(
            query_request,
            image,
            question,
            stream=stream,
            reasoning=reasoning,
            spatial_refs=spatial_refs,
            settings=settings,
        )
        if stream is True:
            return StreamCall(self._stream(QueryStream, request, model, _caller_line()))
        return self._result(request, model, image)

    @_awaited
    def detect(
        self,
        image: ImageInput,
        object: str,
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, DetectResult]:
        """Find objects in a picture and put a box around each.

        Args:
            image: As for `caption`.
            object: The name of the objects, as ``person`` or ``red car``.
            settings: Sampling settings; `max_objects` limits their number.
            model: A model in place of the client's.

        Returns:
            The boxes, in 0-1 of the picture. Cancelling the call drops its connection.

        Raises:
            MoondreamError: The same errors as `caption`.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.detect(md.SAMPLE_IMAGE, "red circle")
        ...         return result.objects
        >>> asyncio.run(main())
        [Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)]
        """
        request = partial(detect_request, image, object, settings=settings)
        return self._result(request, model, image)

    @_awaited
    def point(
        self,
        image: ImageInput,
        object: str,
        settings: Settings | None = None,
        spatial_refs: SpatialRefs | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, PointResult]:
        """Find objects in a picture and put a point in each.

        Args:
            image: As for `caption`.
            object: The name of the objects.
            spatial_refs: The places that `object` is about; see `query`.
            settings: Sampling settings; `max_objects` limits their number.
            model: A model in place of the client's.

        Returns:
            The points, in 0-1 of the picture. Cancelling the call drops its connection.

        Raises:
            MoondreamError: The same errors as `caption`.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.point(md.SAMPLE_IMAGE, "red circle")
        ...         return result.points
        >>> asyncio.run(main())
        [Point(x=0.2184, y=0.5412)]
        """
        request = partial(
            point_request, image, object, spatial_refs=spatial_refs, settings=settings
        )
        return self._result(request, model, image)

    @overload
    def segment(
        self,
        image: ImageInput,
        object: str,
        spatial_refs: SpatialRefs | None = None,
        stream: Literal[False] = False,
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, SegmentResult]: ...

    @overload
    def segment(
        self,
        image: ImageInput,
        object: str,
        spatial_refs: SpatialRefs | None = None,
        *,
        stream: Literal[True],
        settings: Settings | None = None,
        model: str | None = None,
    ) -> StreamCall[SegmentStream]: ...

    @overload
    def segment(
        self,
        image: ImageInput,
        object: str,
        spatial_refs: SpatialRefs | None,
        stream: Literal[True],
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> StreamCall[SegmentStream]: ...

    @overload
    def segment(
        self,
        image: ImageInput,
        object: str,
        spatial_refs: SpatialRefs | None = None,
        *,
        stream: bool,
        settings: Settings | None = None,
        model: str | None = None,
    ) -> Coroutine[Any, Any, SegmentResult | SegmentStream]: ...

    @_awaited
    def segment(
        self,
        image: ImageInput,
        object: str,
        spatial_refs: SpatialRefs | None = None,
        stream: bool = False,
        settings: Settings | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, SegmentResult] | StreamCall[SegmentStream]:
        """Draw the outline of an object.

        Args:
            image: As for `caption`.
            object: The name of the object.
            stream: Whether to return a stream of the outline as it is drawn.
            spatial_refs: The places that `object` is about; see `query`.
            settings: Sampling settings; see `Settings`.
            model: A model in place of the client's.

        Returns:
            A `SegmentResult`; with ``stream=True`` a `SegmentStream`, as soon as the
            server has accepted the request. The path's coordinates are 0-1 of the
            object's box, not of the picture. Cancelling the call drops its connection.

        Raises:
            MoondreamError: The same errors as `caption`.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.segment(md.SAMPLE_IMAGE, "red circle")
        ...         return result.bbox
        >>> asyncio.run(main())
        Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)
        """
        request = partial(
            segment_request,
            image,
            object,
            stream=stream,
            spatial_refs=spatial_refs,
            settings=settings,
        )
        if stream is True:
            return StreamCall(self._stream(SegmentStream, request, model, _caller_line()))
        return self._result(request, model, image)

    @overload
    def chat(
        self,
        messages: Messages,
        stream: Literal[False] = False,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, ChatResult]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        stream: Literal[True],
        settings: Settings | None = None,
        reasoning: bool | None = None,
        *,
        model: str | None = None,
    ) -> StreamCall[ChatStream]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        stream: bool,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, ChatResult | ChatStream]: ...

    @_awaited
    def chat(
        self,
        messages: Messages,
        stream: bool = False,
        settings: Settings | None = None,
        reasoning: bool | None = None,
        *,
        model: str | None = None,
    ) -> Coroutine[Any, Any, ChatResult] | StreamCall[ChatStream]:
        """Continue a conversation, with or without pictures.

        Args:
            messages: In OpenAI's form: mappings with a ``role`` (``user``, ``assistant``, or
                for the first message ``system``) and ``content``, a string or a list of
                parts. A part is text or a picture. A picture is ``{"type": "image_url",
                "image_url": {"url": picture}}`` or the picture alone, given as for `caption`
                (a path as a ``pathlib.Path``, since a string is text). The `message` of an
                earlier result can be used as it is.
            stream: Whether to return a stream of the answer as it is written.
            reasoning: Whether the model thinks first; None leaves it to the server.
            settings: Sampling settings; see `Settings`.
            model: A model in place of the client's.

        Returns:
            A `ChatResult`; with ``stream=True`` a `ChatStream`, as soon as the server
            has accepted the request. Cancelling the call drops its connection.

        Raises:
            MoondreamError: The same errors as `caption`.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         messages = [{"role": "user", "content": ["What is this?", md.SAMPLE_IMAGE]}]
        ...         result = await client.chat(messages)
        ...         return result.message.role
        >>> asyncio.run(main())
        'assistant'
        """
        request = partial(
            chat_request, messages, stream=stream, reasoning=reasoning, settings=settings
        )
        if stream is True:
            return StreamCall(self._stream(ChatStream, request, model, _caller_line()))
        return self._result(request, model)

    async def encode_image(
        self, image: ImageInput, *, max_pixels: int | None = None
    ) -> EncodedImage:
        """Prepare a picture once, to use it in many calls.

        A worker thread does the work. Cancelling returns at once; the thread finishes by itself.

        Args:
            image: As for `caption`.
            max_pixels: The highest width times height; None is the client's limit.

        Raises:
            ImageError: The picture can't be read, or is no picture.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         image = await client.encode_image(md.SAMPLE_IMAGE, max_pixels=100_000)
        ...         await client.detect(image, "circle")
        ...         await client.detect(image, "square")
        ...         return image.width, image.height
        >>> asyncio.run(main())
        (365, 273)
        """
        self._caller.check_open()
        return await self._caller.encode(image, max_pixels=max_pixels)

    async def _result(
        self, make: Callable[..., Request], model: str | None, image: Any = None
    ) -> Any:
        result = await self._caller.call(make(model=self._or_mine(model))).result()
        remember_picture(result, image)
        return result

    async def _stream(
        self,
        kind: type[AnyStream],
        make: Callable[..., Request],
        model: str | None,
        opened_at: str,
    ) -> AnyStream:
        call = self._caller.call(make(model=self._or_mine(model)))
        return kind(
            await call.opening(),
            timeout=self._caller.timeout,
            total_at=call.total_at,
            reopen=call.reopen,
            opened_at=opened_at,
            observer=call.observer,
        )

    def _or_mine(self, model: str | None) -> str | None:
        return self._model if model is None else model


def _caller_line() -> str:
    """Return the file and line of the code that called a method of this module."""
    frame = sys._getframe(2)  # noqa: SLF001 - the documented way there, and a fast one
    return sys.intern(f"{frame.f_code.co_filename}:{frame.f_lineno}")  # one for many streams
