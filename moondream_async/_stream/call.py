"""A call that gives a stream: awaited for it, or entered with it."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from .stream import Stream

if TYPE_CHECKING:
    from types import TracebackType

AnyStream = TypeVar("AnyStream", bound=Stream)


class StreamCall(Coroutine[Any, Any, AnyStream]):
    """A call with ``stream=True``: await it for the stream, or enter it with ``async with``.

    It is a coroutine, and goes wherever one can go, as into ``asyncio.create_task``.
    """

    __slots__ = ("_call", "_stream")

    def __init__(self, call: Coroutine[Any, Any, AnyStream]) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, None, AnyStream]:
        return self._call.__await__()

    async def __aenter__(self) -> AnyStream:
        self._stream = await self._call
        return self._stream

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stream.aclose()

    def send(self, value: Any) -> Any:
        """Run the call on; for event loops."""
        return self._call.send(value)

    def throw(self, *args: Any) -> Any:
        """Raise in the call; for event loops."""
        return self._call.throw(*args)

    def close(self) -> None:
        """End a call that was never awaited, without its warning."""
        self._call.close()
