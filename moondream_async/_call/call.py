"""One call, from its request to its answer, over all its attempts.

`Call.run` is the loop of attempts. An attempt prepares the pictures, waits for a connection slot
and for the rate limiter (only then is a frame of `watch` chosen and prepared), sends the request,
and calls `finish` to read the answer. If it fails and another attempt can help, the next attempt
follows. One timer serves all deadlines, one phase after the other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from multidict import CIMultiDict

from moondream_async._images import is_path
from moondream_async._protocol.answers import (
    decode_json,
    decode_object,
    error_from_response,
    read_result,
)
from moondream_async._protocol.decoders import decoder_for
from moondream_async._protocol.requests import Picture
from moondream_async._stream.opening import Opening
from moondream_async._transport.uploads import size_on_wire
from moondream_async.errors import (
    APIStatusError,
    ClientClosedError,
    MoondreamError,
    StreamProtocolError,
)
from moondream_async.results import ClientStats, Result
from moondream_async.types import EncodedImage, Timeout

from .deadline import CallDeadline
from .report import Instrument, Report
from .retry import CallRetries, Retries, was_refused

if TYPE_CHECKING:
    from moondream_async._protocol.requests import Request, Skill
    from moondream_async._transport.bodies import Body
    from moondream_async._transport.pools import Pool
    from moondream_async._transport.uploads import Upload

    from .session import Session

_ERROR_BODY_SECONDS = 2.0
"""How long to wait for the body of an error; its status is known already."""

_T = TypeVar("_T")
Finish = Callable[["Body"], Awaitable[_T]]
"""Reads the body of an answer with a status of success."""


class Admission(Protocol):
    """Decides when the attempts of a call may start, as for the many calls of one run."""

    async def enter(self) -> None:
        """Wait until the next attempt may start."""

    def leave(self, error: MoondreamError | None, *, answered: bool) -> None:
        """Take note of the end of an attempt: answered, failed with `error`, or cancelled."""


class Caller:
    """Makes calls over a session, with the options of one client (or of its `with_options`)."""

    def __init__(
        self,
        session: Session,
        *,
        timeout: Timeout,
        max_retries: int,
        headers: Mapping[str, str] | None = None,
        is_view: bool = False,
    ) -> None:
        self.session = session
        self.timeout = timeout
        self.max_retries = max_retries
        self.headers = dict(headers or {})
        """Sent with each request to the endpoint, beside the client's own."""
        self._is_view = is_view
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the client was closed: every further call raises `ClientClosedError`."""
        return self._closed or self.session.closed

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self.session.endpoint

    def with_options(
        self,
        *,
        timeout: Timeout | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Caller:
        """Return a caller with other options over the same session; None keeps an option."""
        return Caller(
            self.session,
            timeout=self.timeout if timeout is None else timeout,
            max_retries=self.max_retries if max_retries is None else max_retries,
            headers={**self.headers, **(headers or {})},
            is_view=True,
        )

    def call(
        self,
        request: Request,
        *,
        max_retries: int | None = None,
        timeout: Timeout | None = None,
        retries: Retries | None = None,
        admission: Admission | None = None,
        choose: Callable[[], Request] | None = None,
    ) -> Call:
        """Begin a call; an option that is None is the client's.

        `choose` is for `watch`, which decides at the last moment which picture to send. It is
        called when the call has its connection slot and may send, and returns the request to
        send in place of `request`.
        """
        self.check_open()
        if retries is None:
            most = self.max_retries if max_retries is None else max_retries
            retries = CallRetries(most, self.session.budget)
        return Call(
            self.session,
            request,
            timeout=self.timeout if timeout is None else timeout,
            headers=self.headers,
            retries=retries,
            admission=admission,
            choose=choose,
        )

    def instrument(self, start: Instrument) -> Callable[[], None]:
        """Call `start` for each call of the session, as for tracing; return what ends this."""
        session = self.session
        session.instruments += (start,)

        def stop() -> None:
            session.instruments = tuple(each for each in session.instruments if each is not start)

        return stop

    def check_open(self) -> None:
        """Raise `ClientClosedError` if the client was closed."""
        if self._closed or self.session.closed:
            raise ClientClosedError("The client is closed")

    def stats(self) -> ClientStats:
        """Return what the client is doing and has done."""
        return self.session.stats()

    async def encode(
        self, image: Any, *, max_pixels: int | None = None, max_bytes: int | None = None
    ) -> EncodedImage:
        """Prepare a picture, in a thread unless that takes hardly any time."""
        return await self.session.encode(image, max_pixels=max_pixels, max_bytes=max_bytes)

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[Caller]:
        """Lend a caller with its own connections, for a request that no limit may delay."""
        session = self.session.apart()
        try:
            yield Caller(
                session, timeout=self.timeout, max_retries=self.max_retries, headers=self.headers
            )
        finally:
            await session.aclose(None)

    async def aclose(self, grace: float | None) -> None:
        """Refuse further calls. Close the session, unless this is a view (`with_options`)."""
        self._closed = True
        if not self._is_view:
            await self.session.aclose(grace)


class Call:
    """One call, over all its attempts."""

    def __init__(
        self,
        session: Session,
        request: Request,
        *,
        timeout: Timeout,
        headers: Mapping[str, str],
        retries: Retries,
        admission: Admission | None,
        choose: Callable[[], Request] | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        total = timeout.total
        # With an admission, the total counts for each attempt, from its admission on.
        has_total = total is not None and admission is None
        self.total_at = loop.time() + (total or 0) if has_total else None
        self._session = session
        self._request = request
        self._timeout = timeout
        self._headers = headers
        self._retries = retries
        self._admission = admission
        self._choose = choose
        self._is_admitted = False
        self._pool: Pool | None = None
        self._parts: list[Any] | None = None  # of the body, with its pictures prepared
        self._was_sent = False
        self._sent_at = 0.0  # on the loop's clock
        self.report = Report(request, session.endpoint, session.hooks, session.instruments, loop)

    # -- the kinds of answers ---------------------------------------------------------

    def result(self) -> Coroutine[Any, Any, Result]:
        """Return the result of a skill; raise the error if the answer reports one."""
        assert self._request.skill is not None  # noqa: S101 - for the type checker
        skill = self._request.skill

        def read(body: Body) -> Awaitable[Result]:
            headers = CIMultiDict(body.headers)  # aiohttp's own can't be pickled
            decode = partial(_decode_result, skill, status=body.status, headers=headers)
            return body.whole(partial(self._decoded, decode))

        return self.run(read, accept="application/json")

    def json(self) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the decoded answer; raise the error if the answer reports one."""
        return self._whole(decode_json)

    def record(self) -> Coroutine[Any, Any, dict[str, Any]]:
        """Return the decoded answer, or {} if it is empty.

        A field ``error`` in it raises nothing: the record of a failed job has one.
        """
        return self._whole(_decode_record)

    def opening(self) -> Coroutine[Any, Any, Opening]:
        """Return the beginning of a stream, once the server has accepted the request.

        The stream calls `report.ended` at its end.
        """
        return self.run(self._open, is_whole=False)

    async def reopen(self, error: MoondreamError) -> Opening:
        """Make another attempt after `error`, and return its beginning; or raise `error`."""
        return await self.run(self._open, is_whole=False, failed=error)

    def download(self, after: MoondreamError | None = None) -> Coroutine[Any, Any, Body]:
        """Return the body of the answer, which the caller reads and closes.

        After reading has failed with the error `after`, another attempt returns the body from
        its beginning, or `after` is raised if none can help. The caller calls `report.ended`
        at the end.
        """
        return self.run(_as_it_is, accept="*/*", is_whole=False, failed=after)

    @property
    def observer(self) -> Report | None:
        """The observer for a stream; None if no hook or probe needs one."""
        return self.report if self.report.is_heard else None

    def _whole(self, decode: Callable[..., _T]) -> Coroutine[Any, Any, _T]:
        def read(body: Body) -> Awaitable[_T]:
            return body.whole(partial(self._decoded, partial(decode, status=body.status)))

        return self.run(read, accept="application/json")

    # -- the attempts -----------------------------------------------------------------

    async def run(
        self,
        finish: Finish[_T],
        *,
        accept: str | None = None,
        is_whole: bool = True,
        failed: MoondreamError | None = None,
    ) -> _T:
        """Make attempts until `finish` has read an answer, or another attempt can't help.

        Args:
            finish: Reads the answer.
            accept: The header ``Accept``; None takes what the request needs.
            is_whole: Whether the call is over when `finish` is done.
            failed: The error of the last attempt, if this call goes on after it.
        """
        session = self._session
        if self._pool is None:
            session.check_open()
            self._pool = session.transport.pool()
        pool = self._pool
        deadline = CallDeadline(pool, self._timeout, self.total_at, session.slots)
        pool.calls.add(deadline)  # also between two attempts
        try:
            delay = 0.0 if failed is None else self._delay_after(failed, deadline)
            if delay is None and failed is not None:
                raise failed  # noqa: TRY301 - its end is that of any other
            while True:
                try:
                    with deadline:
                        if delay:
                            await asyncio.sleep(delay)
                        answer = await self._attempt(deadline, finish, accept)
                        self._leave(answered=True)
                        self._retries.succeeded()
                        if is_whole:
                            self.report.answered(answer)
                        return answer
                    raise deadline.error()
                except MoondreamError as error:
                    self._leave(error)
                    delay = self._delay_after(session.secret.error(error), deadline)
                    if delay is None:
                        raise
        except BaseException as error:
            self._leave()
            if failed is None:  # else the stream or download that goes on reports its end
                self.report.ended(error=error)
            raise
        finally:
            deadline.cancel()
            pool.leave(deadline)

    def _leave(self, error: MoondreamError | None = None, *, answered: bool = False) -> None:
        if self._admission is not None and self._is_admitted:
            self._is_admitted = False
            self._admission.leave(error, answered=answered)

    def _delay_after(self, error: MoondreamError, deadline: CallDeadline) -> float | None:
        """Return the seconds until the next attempt after a failure; None if there is none."""
        if deadline.pool.closed:
            return None
        if self._is_refusal_to_stream(error):  # asking without streaming is no retry
            self._request = self._request.without_stream()
            pictures = [part for part in self._parts or () if isinstance(part, EncodedImage)]
            parts = self._request.parts()
            self._parts = [pictures.pop(0) if isinstance(part, Picture) else part for part in parts]
            return 0.0
        if not self._request.repeatable and self._was_sent and not was_refused(error):
            return None
        jitter = random.random()  # noqa: S311 - no secret
        delay = self._retries.delay(error, jitter=jitter, left=deadline.left_in_total)
        if delay is not None:
            self._session.count(retries=1)
            self.report.retried(delay, error, most=self._retries.most)
        return delay

    def _is_refusal_to_stream(self, error: MoondreamError) -> bool:
        """Tell whether the server can't stream with reasoning; kestrel says so with 400."""
        return (
            isinstance(error, APIStatusError)
            and error.status in (400, 422)
            and self._request.stream
            and self._request.payload.get("reasoning") is True
            and "stream" in error.message.lower()
        )

    async def _attempt(self, deadline: CallDeadline, finish: Finish[_T], accept: str | None) -> _T:
        """Send the request once, and have its answer read."""
        session, request, report = self._session, self._request, self.report
        pool = deadline.pool
        rated = session.admission is not None and not request.elsewhere
        is_prepared = False
        self._was_sent = False
        try:
            if rated:
                await session.admission.wait()  # type: ignore[union-attr]
            if self._parts is None and self._choose is None:
                is_prepared = await self._prepare(deadline)
            if self._admission is not None:
                await self._admission.enter()
                self._is_admitted = True
                deadline.begin_total()
            if not session.slots.try_acquire():
                deadline.enter("pool")
                await session.slots.acquire()
                deadline.enter(None)
        finally:
            if is_prepared:
                session.preparing.release()
        try:
            if rated:
                await session.rate_limiter.wait()  # type: ignore[union-attr]
            parts = self._parts or await self._prepare_late(deadline)
            deadline.enter("connect")
            size = size_on_wire(parts)
            report.began(size)
            session.count(requests=1, bytes_sent=size)
            body = await pool.request(
                request.method,
                session.url(request),
                headers=self._headers_for(accept),
                secrets=session.secrets(request),
                body=parts,
                size=size,
                on_send=partial(self._sending, deadline),
                on_close=session.release,
                repeatable=request.repeatable,
                leave_origin=request.elsewhere,
            )
        except BaseException:
            session.slots.release()
            raise
        report.responded(body, pool.loop.time() - deadline.sent_at)
        if 200 <= body.status < 300:
            try:
                return await finish(body)
            except APIStatusError as error:
                error.headers = CIMultiDict(body.headers)
                raise
        wait = min(_ERROR_BODY_SECONDS, max(deadline.left, 0))
        deadline.enter(None)
        data = session.redact(await body.read_error(wait))
        raise error_from_response(
            body.status, body.headers, data, now=time.time(), endpoint=session.endpoint
        )

    async def _prepare(self, deadline: CallDeadline) -> bool:
        """Make the body; return whether a slot of `Session.preparing` was taken for it."""
        session = self._session
        parts = self._request.parts()
        is_held = False
        try:
            for place, part in enumerate(parts):
                if type(part) is not Picture:
                    continue
                image = session.encode_at_once(part.source)
                if image is None:
                    if not is_held:
                        await self._acquire_preparing(deadline)
                        is_held = True
                    if is_path(part.source):
                        image = await session.encode_small(part.source, deadline.pool.short_jobs)
                    if image is None:
                        image = await session.encode_later(part.source)
                parts[place] = image
        except BaseException:
            if is_held:
                session.preparing.release()
            raise
        self._parts = parts
        return is_held

    async def _prepare_late(self, deadline: CallDeadline) -> Sequence[Any]:
        """Make the body of the request that `choose` returns."""
        if self._choose is None:
            return ()
        self._request, self._choose = self._choose(), None
        if await self._prepare(deadline):
            self._session.preparing.release()
        return self._parts or ()

    async def _acquire_preparing(self, deadline: CallDeadline) -> None:
        session = self._session
        if not session.preparing.try_acquire():
            # While connection slots are free, `Timeout.pool` does not run out.
            deadline.enter("pool", lambda: session.slots.taken < session.slots.total)
            await session.preparing.acquire()
            deadline.enter(None)

    def _headers_for(self, accept: str | None) -> dict[str, str]:
        if accept is None:
            accept = "text/event-stream" if self._request.stream else "application/json"
        headers = self._session.headers(accept, self._request, self._headers)
        if self.report.is_traced and not self._request.elsewhere:
            headers.update(self.report.headers())
        return headers

    def _sending(self, deadline: CallDeadline, upload: Upload) -> None:
        """Start the limit of the server's answer when the last byte has been sent."""
        self._was_sent = True
        if upload.is_sent:
            deadline.sent()
        else:
            deadline.sending(upload.moved)
        self._sent_at = deadline.sent_at

    # -- the reading of answers -------------------------------------------------------

    async def _open(self, body: Body) -> Opening:
        skill = self._request.skill
        assert skill is not None  # noqa: S101 - only skills stream
        decoder = decoder_for(skill, secret=self._session.secret)
        headers = CIMultiDict(body.headers)
        try:
            if await self._is_json(body):
                events = await body.whole(partial(self._decoded, decoder.body))
                return Opening(decoder, events=events, sent_at=self._sent_at, headers=headers)
        except BaseException:
            body.close()
            raise
        waited = asyncio.get_running_loop().time() - self._sent_at
        return Opening(decoder, body, sent_at=self._sent_at, waited=waited, headers=headers)

    async def _is_json(self, body: Body) -> bool:
        """Tell JSON from events by the content type, or without one by the first byte.

        Raises:
            StreamProtocolError: The content type is neither.
        """
        kind = body.content_type
        if kind == "text/event-stream":
            return False
        if kind == "application/json" or kind.endswith("+json"):
            return True
        if kind not in ("", "text/plain", "application/octet-stream"):
            data = self._session.redact(await body.read_error(_ERROR_BODY_SECONDS))
            excerpt = data[:200].decode("utf-8", "replace")
            raise StreamProtocolError(
                f"The server answered with {kind}, not with events: {excerpt}"
            )
        try:
            data = await body.__anext__()
        except StopAsyncIteration:
            return False
        body.unread(data)
        return data.lstrip()[:1] == b"{"

    def _decoded(self, decode: Callable[[bytes], _T], data: bytes) -> _T:
        with suppress(APIStatusError):
            return decode(data)
        # Outside of the `with`, so that an error that quotes the key is not the context of this
        # one; and under the same name, so that no traceback shows the old value of `data`.
        data = self._session.redact(data)
        return decode(data)


async def _as_it_is(body: Body) -> Body:
    return body


def _decode_result(skill: Skill, body: bytes, *, status: int, headers: Mapping[str, str]) -> Result:
    return read_result(skill, decode_json(body, status=status), status=status, headers=headers)


def _decode_record(body: bytes, *, status: int) -> dict[str, Any]:
    return decode_object(body, status=status) if body.strip() else {}
