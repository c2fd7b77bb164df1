"""The calls: what a client can ask a server for.

Each checks its arguments and makes a `Request`; how that is sent, and sent again
where that helps, is the `Caller`'s business.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from ._protocol.answers import read_models, read_stats
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
from .errors import NotFoundError, ServerError
from .results import (
    CaptionResult,
    ChatMessage,
    ChatResult,
    DetectResult,
    Health,
    Model,
    PointResult,
    QueryResult,
    SegmentResult,
    ServerStats,
    SpatialRefs,
    remember_picture,
)
from .types import EncodedImage, ImageInput, Length, Settings

if TYPE_CHECKING:
    from ._call.call import Caller

_MethodT = TypeVar("_MethodT", bound=Callable[..., Any])

Messages = Sequence[Mapping[str, Any] | ChatMessage]


def _awaited(method: _MethodT) -> _MethodT:
    """Mark a method whose value is to be awaited, for tools that look at functions.

    It is no ``async def``, since what it returns with ``stream=True`` can be entered too.
    """
    mark = getattr(inspect, "markcoroutinefunction", None)  # of Python 3.12
    return method if mark is None else mark(method)


class Skills:
    """The calls of a client, as a part of it."""

    _caller: Caller
    _model: str | None

    def __init_subclass__(cls) -> None:
        if Skills in cls.__bases__:  # so that a reference shows the client's calls at the client
            for name, call in vars(Skills).items():
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
            image: A path, bytes, an open binary file, a PIL image, or what
                `encode_image` returned.
            length: ``short``, ``normal`` or ``long``.
            stream: Whether to get the description as it is written.
            settings: Sampling settings; see `Settings`.
            model: A model other than the client's.

        Returns:
            A `CaptionResult`; with ``stream=True`` a `CaptionStream`, as soon as the
            server has accepted the request. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.caption(md.SAMPLE_IMAGE, length="short")
        ...         async with client.caption(md.SAMPLE_IMAGE, "short", stream=True) as stream:
        ...             return result.caption == await stream.text()
        >>> asyncio.run(main())
        True
        """

        def request() -> Request:
            return caption_request(
                image,
                length=length,
                stream=stream,
                settings=settings,
                model=self._or_mine(model),
            )

        if stream is True:
            return StreamCall(self._stream(CaptionStream, request, _caller_line()))
        return self._result(request, image)

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
        """Answer a question about a picture, or, on servers that do so, about none.

        Args:
            image: As for `caption`.
            question: The question.
            stream: Whether to get the answer as it is written.
            reasoning: Whether the model is to think first; None leaves it to the
                server. Where a server can't do that and stream, the answer comes
                in one piece.
            spatial_refs: Places that the question speaks of: points ``[x, y]`` and
                boxes ``[x_min, y_min, x_max, y_max]``, in 0-1 of the picture, or
                what `point` and `detect` found.
            settings: Sampling settings; see `Settings`.
            model: A model other than the client's.

        Returns:
            A `QueryResult`; with ``stream=True`` a `QueryStream`, as soon as the server
            has accepted the request. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.query(md.SAMPLE_IMAGE, "How many?", reasoning=True)
        ...         return result.answer, result.reasoning.text
        >>> answer, thoughts = asyncio.run(main())
        """

        def request() -> Request:
            return query_request(
                image,
                question,
                stream=stream,
                reasoning=reasoning,
                spatial_refs=spatial_refs,
                settings=settings,
                model=self._or_mine(model),
            )

        if stream is True:
            return StreamCall(self._stream(QueryStream, request, _caller_line()))
        return self._result(request, image)

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
            object: What to look for, as ``person`` or ``red car``.
            settings: Sampling settings; `max_objects` limits how many are found.
            model: A model other than the client's.

        Returns:
            The boxes, in 0-1 of the picture. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.detect(md.SAMPLE_IMAGE, "red circle")
        ...         return result.objects
        >>> asyncio.run(main())
        [Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)]
        """

        def request() -> Request:
            return detect_request(image, object, settings=settings, model=self._or_mine(model))

        return self._result(request, image)

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
            object: What to look for.
            spatial_refs: Places that `object` speaks of; see `query`.
            settings: Sampling settings; `max_objects` limits how many are found.
            model: A model other than the client's.

        Returns:
            The points, in 0-1 of the picture. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.point(md.SAMPLE_IMAGE, "red circle")
        ...         return result.points
        >>> asyncio.run(main())
        [Point(x=0.2184, y=0.5412)]
        """

        def request() -> Request:
            return point_request(
                image,
                object,
                spatial_refs=spatial_refs,
                settings=settings,
                model=self._or_mine(model),
            )

        return self._result(request, image)

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
            object: What to outline.
            stream: Whether to get the outline as it is drawn.
            spatial_refs: Places that `object` speaks of; see `query`.
            settings: Sampling settings; see `Settings`.
            model: A model other than the client's.

        Returns:
            A `SegmentResult`; with ``stream=True`` a `SegmentStream`, as soon as the
            server has accepted the request. The path's coordinates are 0-1 of the
            object's box, not of the picture. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         result = await client.segment(md.SAMPLE_IMAGE, "red circle")
        ...         return result.bbox
        >>> asyncio.run(main())
        Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)
        """

        def request() -> Request:
            return segment_request(
                image,
                object,
                stream=stream,
                spatial_refs=spatial_refs,
                settings=settings,
                model=self._or_mine(model),
            )

        if stream is True:
            return StreamCall(self._stream(SegmentStream, request, _caller_line()))
        return self._result(request, image)

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
        """Go on with a conversation, with pictures or without.

        Args:
            messages: OpenAI-style: each a mapping with a ``role`` (``system``, first
                only, ``user`` or ``assistant``) and ``content``, a string or a list of
                parts. A part is text or a picture: ``{"type": "image_url", "image_url":
                {"url": picture}}`` or just the picture, given as for `caption` (a path
                as a ``pathlib.Path``, since a string is text). An earlier result's
                `message` goes in as it is.
            stream: Whether to get the answer as it is written.
            reasoning: Whether the model is to think first; None leaves it to the server.
            settings: Sampling settings; see `Settings`.
            model: A model other than the client's.

        Returns:
            A `ChatResult`; with ``stream=True`` a `ChatStream`, as soon as the server
            has accepted the request. Cancelling the call drops its connection.

        Raises:
            RequestError: An argument can't be right; nothing was sent.
            ImageError: The picture can't be; nothing was sent.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         messages = [{"role": "user", "content": ["What is this?", md.SAMPLE_IMAGE]}]
        ...         result = await client.chat(messages)
        ...         return result.message.role
        >>> asyncio.run(main())
        'assistant'
        """

        def request() -> Request:
            return chat_request(
                messages,
                stream=stream,
                reasoning=reasoning,
                settings=settings,
                model=self._or_mine(model),
            )

        if stream is True:
            return StreamCall(self._stream(ChatStream, request, _caller_line()))
        return self._result(request)

    async def models(self) -> list[Model]:
        """Return the models that the server offers.

        The cloud's list is known to leave out models that work.

        Raises:
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         return await client.models()
        >>> "moondream3-preview" in [model.id for model in asyncio.run(main())]
        True
        """
        request = Request(None, "/models", method="GET", bearer=True)
        return read_models(await self._caller.call(request).json())

    async def health(self) -> Health:
        """Ask the server how it is. It is asked once; nothing is retried.

        Moondream Station and the open engine have an address for this. A server that
        has none, like the cloud, is asked for its models instead.

        Raises:
            APIConnectionError, APITimeoutError: It can't be reached.
            APIStatusError: It refuses.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         return await client.health()
        >>> asyncio.run(main())
        Health(ok=True, status='ok')
        """
        for path in ("/health", "/healthz"):
            request = Request(None, path, method="GET", at_root=True)
            try:
                raw = await self._caller.call(request, max_retries=0).json()
            except NotFoundError:
                continue
            except ServerError as error:
                if isinstance(error.body, dict) and isinstance(error.body.get("status"), str):
                    return Health(ok=False, status=error.body["status"], raw=error.body)
                raise
            return Health(ok=True, status=str(raw.get("status", "ok")), raw=raw)
        request = Request(None, "/models", method="GET", bearer=True)
        raw = await self._caller.call(request, max_retries=0).json()
        return Health(ok=True, status="ok", raw=raw)

    async def server_stats(self) -> ServerStats:
        """Ask a Moondream Station how busy it is.

        Raises:
            NotFoundError: The server is none.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or meanwhile.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         try:
        ...             return (await client.server_stats()).queue_size
        ...         except md.NotFoundError:
        ...             return "not a Moondream Station"
        >>> asyncio.run(main())
        'not a Moondream Station'
        """
        return read_stats(await self._caller.call(Request(None, "/stats", method="GET")).json())

    async def encode_image(
        self, image: ImageInput, *, max_pixels: int | None = None
    ) -> EncodedImage:
        """Prepare a picture once, to use it in many calls.

        The work is done in a worker thread. Cancelling returns at once and lets the
        thread finish by itself.

        Args:
            image: As for `caption`.
            max_pixels: Width times height at most; None is the client's own limit.

        Raises:
            ImageError: It can't be read, or is no picture.

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

    async def _result(self, make: Callable[[], Request], image: Any = None) -> Any:
        result = await self._caller.call(make()).result()
        remember_picture(result, image)
        return result

    def _or_mine(self, model: str | None) -> str | None:
        return self._model if model is None else model

    async def _stream(
        self, stream: type[AnyStream], request: Callable[[], Request], opened_at: str
    ) -> AnyStream:
        call = self._caller.call(request())
        return stream(
            await call.opening(),
            timeout=self._caller.timeout,
            total_at=call.total_at,
            reopen=call.reopen,
            opened_at=opened_at,
            observer=call.observer,
        )


def _caller_line() -> str:
    """Return the file and line that called into this module."""
    frame = sys._getframe(2)  # noqa: SLF001 - the documented way there, and a fast one
    return sys.intern(f"{frame.f_code.co_filename}:{frame.f_lineno}")  # one for many streams
