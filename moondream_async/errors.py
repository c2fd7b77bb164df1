"""What can go wrong, as one tree.

::

    MoondreamError
      RequestError(ValueError)          a bad argument; raised before any I/O
        ImageError                      unreadable, unsupported or too large a picture
        MissingExtraError(ImportError)  what to install; raised before any request
      APIConnectionError                could not connect, or lost before a response
      APITimeoutError(TimeoutError)     .phase: pool | connect | first_event | idle | total
      APIStatusError                    .status .message .type .code .param .request_id ...
        BadRequestError                 400 422
        AuthenticationError             401
        PermissionDeniedError           403
        NotFoundError                   404
        PayloadTooLargeError            413
        RateLimitError                  429
        ServerError                     5xx
      StreamError                       .partial: the text that had arrived
        StreamInterruptedError          ended before completed
        StreamStalledError(APITimeoutError)   out of time in the middle of an answer
        StreamProtocolError             not events: bad JSON, an event over the size limit
        StreamServerError               the server reported an error in the stream
      ClientClosedError                 used after aclose, or closed while reading

No exception of aiohttp, asyncio or msgspec reaches the caller: it is the ``__cause__`` of an
error in this tree. All errors can be pickled, so that they travel between processes. No
message holds the API key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

Phase = Literal["pool", "connect", "first_event", "idle", "total"]


class MoondreamError(Exception):
    """The root of all errors that this package raises on purpose.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         try:
    ...             await client.caption("no such file.jpg")
    ...         except md.ImageError as error:  # a MoondreamError, as all that the package raises
    ...             print(isinstance(error, md.MoondreamError))
    >>> asyncio.run(main())
    True
    """

    _fields: ClassVar[tuple[str, ...]] = ()  # attributes beside the message, for pickling

    @property
    def message(self) -> str:
        """The error in a sentence."""
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in self._fields}
        return _rebuild, (type(self), self.message, fields)


def _rebuild(cls: type[MoondreamError], message: str, fields: dict[str, Any]) -> MoondreamError:
    return cls(message, **fields)


class RequestError(MoondreamError, ValueError):
    """An argument can't be right. Raised before any I/O."""


class ImageError(RequestError):
    """A picture is unreadable, of an unsupported kind, or too large. Raised before any request."""


class MissingExtraError(RequestError, ImportError):
    """Something needs a package that is not installed; the message says what to install."""


class APIConnectionError(MoondreamError):
    """The server could not be reached, or the connection was lost before it answered.

    Attributes:
        permanent: Whether a retry can't help, as with a certificate that doesn't verify.
    """

    _fields: ClassVar[tuple[str, ...]] = ("permanent",)

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class APITimeoutError(MoondreamError, TimeoutError):
    """A limit of `Timeout` ran out.

    Attributes:
        phase: Which limit: ``pool`` (waiting for a free connection), ``connect``,
            ``first_event`` (waiting for the answer to begin), ``idle`` (between two
            events) or ``total``.
    """

    _fields: ClassVar[tuple[str, ...]] = ("phase",)

    def __init__(self, message: str, *, phase: Phase) -> None:
        super().__init__(message)
        self.phase: Phase = phase


class APIStatusError(MoondreamError):
    """The server answered with an error: another status than 2xx, or a body with ``error`` in it.

    Moondream Station sends such bodies with status 200.

    Attributes:
        status: The HTTP status.
        type: The server's name for the kind of error, as ``authentication_error``.
        code: The server's error code.
        param: The request field that the server objects to.
        request_id: The server's id for the request, where it gave one.
        retry_after: Seconds that the server asks to wait, where it said so.
        headers: The response's headers; their names may be written in upper or lower case.
            Empty where the error has no response of its own.
        body: The decoded JSON body, or the beginning of any other body as text.
    """

    _fields: ClassVar[tuple[str, ...]] = (
        "status",
        "type",
        "code",
        "param",
        "request_id",
        "retry_after",
        "headers",
        "body",
    )

    def __init__(
        self,
        message: str,
        *,
        status: int,
        type: str | None = None,  # noqa: A002 - the API's word
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.headers: Mapping[str, str] = {} if headers is None else headers
        self.body = body


class BadRequestError(APIStatusError):
    """400 or 422: the server refuses the request as it is."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this, or a gateway turned the client away."""


class NotFoundError(APIStatusError):
    """404: no such endpoint, model or object on this server."""


class PayloadTooLargeError(APIStatusError):
    """413: the picture or upload is over the server's limit."""


class RateLimitError(APIStatusError):
    """429: too many requests for this account."""


class ServerError(APIStatusError):
    """5xx, or a failure that a server reported with status 200."""


class StreamError(MoondreamError):
    """A streamed answer did not come whole.

    Attributes:
        partial: The text that had arrived.
    """

    _fields: ClassVar[tuple[str, ...]] = ("partial",)

    def __init__(self, message: str, *, partial: str = "") -> None:
        super().__init__(message)
        self.partial = partial


class StreamInterruptedError(StreamError):
    """The stream ended before the server said that the answer is complete."""


class StreamStalledError(StreamError, APITimeoutError):
    """Time ran out in the middle of an answer.

    `phase` is ``idle`` (too long between two events) or ``total``.
    """

    _fields: ClassVar[tuple[str, ...]] = ("phase", "partial")

    def __init__(self, message: str, *, phase: Phase = "idle", partial: str = "") -> None:
        MoondreamError.__init__(self, message)
        self.phase = phase
        self.partial = partial


class StreamProtocolError(StreamError):
    """The server sent no events: bad JSON, or one event over the size limit."""


class StreamServerError(StreamError):
    """The server reported an error inside the stream.

    Attributes:
        type: The server's name for the kind of error.
        code: The server's error code.
        body: The decoded event.
    """

    _fields: ClassVar[tuple[str, ...]] = ("partial", "type", "code", "body")

    def __init__(
        self,
        message: str,
        *,
        partial: str = "",
        type: str | None = None,  # noqa: A002 - the API's word
        code: str | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(message, partial=partial)
        self.type = type
        self.code = code
        self.body = body


class ClientClosedError(MoondreamError):
    """The client or the stream was closed before it was used, or meanwhile."""
