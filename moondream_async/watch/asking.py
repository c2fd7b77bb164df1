"""The call about a frame; the rest of `watch` knows nothing of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moondream_async._stream.kinds import CaptionStream, QueryStream, SegmentStream
from moondream_async._stream.stream import Stream
from moondream_async.bulk.items import NO_PICTURE, Asking
from moondream_async.errors import RequestError

from .items import Frame

if TYPE_CHECKING:
    from moondream_async._call.call import Caller
    from moondream_async._protocol.requests import Request

_STREAMS: dict[str, type[Stream]] = {
    "caption": CaptionStream,
    "query": QueryStream,
    "segment": SegmentStream,
}
_NEEDED = {"query": "question", "detect": "object", "point": "object", "segment": "object"}


class Question:
    """A skill with its arguments, which is asked about one frame after the other.

    Raises:
        RequestError: There is no such skill, it can't stream, or an argument can't be right.
    """

    def __init__(
        self,
        caller: Caller,
        skill: str,
        arguments: Mapping[str, Any],
        *,
        stream: bool,
        model: str | None,
    ) -> None:
        if not isinstance(skill, str):
            raise RequestError(f"skill must be the name of one, not {skill!r}")
        self._stream = _STREAMS.get(skill) if stream else None
        if stream and self._stream is None:
            raise RequestError(f"stream=True takes one of {', '.join(_STREAMS)}, not {skill!r}")
        needed = _NEEDED.get(skill)
        if needed is not None and arguments.get(needed) is None:
            raise RequestError(f"{skill} needs the argument {needed}")
        self._caller = caller
        self._asking = Asking(skill, arguments, model=model, stream=stream)

    async def ask(self, choose: Callable[[], Any]) -> Any:
        """Ask about a frame, without retries: a newer frame takes the next attempt.

        `choose` returns the frame. It is called when the call has its connection slot, so that
        no frame is prepared and then waits for a slot while newer ones come.

        Returns:
            The result, or the stream once the server has accepted the request.
        """
        call = self._caller.call(
            self._about(NO_PICTURE), max_retries=0, choose=lambda: self._about(choose())
        )
        if self._stream is None:
            return await call.result()
        return self._stream(
            await call.opening(),
            timeout=self._caller.timeout,
            total_at=call.total_at,
            observer=call.observer,
        )

    def _about(self, frame: Any) -> Request:
        image, make = self._asking.about(frame.image if isinstance(frame, Frame) else frame)
        return make(image)
