"""A call that gives a stream when it is awaited or entered."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .stream import Stream

AnyStream = TypeVar("AnyStream", bound=Stream)


_WAY_OUT = (
    "with stream=True this is a call, which gives a stream when it is awaited, as in "
    "'stream = await client.caption(image, stream=True)', or entered, as in "
    "'async with client.caption(image, stream=True) as stream:'"
)


class StreamCall(Coroutine[Any, Any, AnyStream]):
    """A call with ``stream=True``: await it for the stream, or enter it with ``async with``.

    The call is a coroutine, and can be used as one, as in ``asyncio.create_task(call)``.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         call = client.caption(md.SAMPLE_IMAGE, "short", stream=True)
    ...         stream = await asyncio.create_task(call)
    ...         async with stream:
    ...             return stream
    >>> asyncio.run(main())
    <CaptionStream closed, 0 characters, request None>
    """

    __slots__ = ("_call", "_stream")

    def __init__(self, call: Coroutine[Any, Any, AnyStream]) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, None, AnyStream]:
        return self._call.__await__()

    async def __aenter__(self) -> AnyStream:
        self._stream = await self._call
        return self._stream

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stream.aclose()

    # -- operations of a stream, which a call refuses --------------------------------

    def _refuse(self, *_: Any) -> NoReturn:
        """Raise an error that says what to do instead."""
        self._call.close()  # without the warning that it was never awaited
        raise TypeError(_WAY_OUT)

    if not TYPE_CHECKING:  # type checkers say by themselves that there are none
        __aiter__ = __anext__ = __enter__ = __exit__ = __iter__ = __getitem__ = _refuse

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_") or not hasattr(Stream, name):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise AttributeError(f"A call has no {name!r}: {_WAY_OUT}")

    def __reduce__(self) -> NoReturn:
        raise TypeError("A call can't be copied: it is made once")

    def send(self, value: Any) -> Any:
        """Resume the call; for event loops."""
        return self._call.send(value)

    def throw(self, *args: Any) -> Any:
        """Raise an exception in the call; for event loops."""
        return self._call.throw(*args)

    def close(self) -> None:
        """End a call that was never awaited, without a warning."""
        self._call.close()
