"""One call, from its request to its answer, over all its tries.

A try waits for one of the client's places, has its pictures prepared, is sent, and
is read; where it fails and another can help, the next one follows. One cancel scope
and one timer carry all deadlines of a try, from one phase to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio._backends._asyncio  # what the first await would load else, holding up the loop
from anyio import CancelScope
from yarl import URL

from moondream_async._images import encode_at_once, encode_image
from moondream_async._protocol import USER_AGENT
from moondream_async._protocol.answers import (
    decode_json,
    decode_object,
    error_from_response,
    read_result,
    to_id,
)
from moondream_async._protocol.events import decoder_for
from moondream_async._protocol.secret import Secret, conceal, redact
from moondream_async._stream.clock import running_loop
from moondream_async._stream.opening import Opening
from moondream_async._transport.bodies import Body
from moondream_async._transport.pools import Pool, Transport
from moondream_async._transport.uploads import size_on_wire
from moondream_async.errors import (
    APIStatusError,
    APITimeoutError,
    ClientClosedError,
    MoondreamError,
    Phase,
    StreamProtocolError,
)
from moondream_async.results import ClientStats, Result
from moondream_async.types import CallEvent, EncodedImage, Hooks, Timeout

from .limits import Pace, Places
from .retry import Budget, backoff, is_worth_retrying, was_refused

if TYPE_CHECKING:
    import ssl

    import aiohttp

    from moondream_async._protocol.requests import Request, Skill

_NEVER = float("inf")
_SHORTEST_SECRET = 8
_log = logging.getLogger("moondream_async")
_T = TypeVar("_T")
_Answer = TypeVar("_Answer", Result, dict[str, Any])


class Caller:
    """What all calls of a client share, and the way to make one."""

    def __init__(
        self,
        endpoint: str,
        key: Secret | None,
        *,
        timeout: Timeout,
        max_retries: int,
        max_connections: int,
        rate_limit: float | None,
        session: aiohttp.ClientSession | None,
        ssl_context: ssl.SSLContext | None,
        proxy: str | None,
        max_pixels: int | None,
        hooks: Hooks,
    ) -> None:
        self.closed = False
        self.endpoint = endpoint
        self.key = key
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_pixels = max_pixels
        self.hooks = hooks
        self.budget = Budget()
        self.places = Places(max_connections)
        # Two, since one can't do both: the first keeps a long line of calls from running
        # into `timeout.pool`, the second keeps the pace exactly, right before sending.
        self.admission = None if rate_limit is None else Pace(rate_limit)
        self.pace = None if rate_limit is None else Pace(rate_limit)
        self.transport = Transport(session=session, ssl_context=ssl_context, proxy=proxy)
        self._lock = threading.RLock()  # see `limits` on why its own thread may take it again
        self._counts = dict.fromkeys(("requests", "retries", "bytes_sent", "bytes_received"), 0)

    def count(self, **more: int) -> None:
        """Add to the numbers that `stats` tells; from any thread."""
        with self._lock:
            for name, number in more.items():
                self._counts[name] += number

    def free_place(self, received: int) -> None:
        """Take note of the end of an answer.

        Whoever has this method keeps the connections: a stream goes on when the client
        has been dropped. It does not keep the call, whose pictures may be large.
        """
        self.places.give_back()
        self.count(bytes_received=received)

    def stats(self) -> ClientStats:
        """Return what the client is doing and has done."""
        pooled = self.transport.idle_connections  # which has a lock of its own
        with self._lock:
            return ClientStats(
                open_streams=self.places.taken,
                waiting_calls=self.places.waiting,
                pooled_connections=pooled,
                **self._counts,
            )

    def call(
        self, request: Request, *, max_retries: int | None = None, timeout: Timeout | None = None
    ) -> Call:
        """Begin a call; None is what the client was told."""
        self.check_open()
        return Call(
            self,
            request,
            max_retries=self.max_retries if max_retries is None else max_retries,
            timeout=self.timeout if timeout is None else timeout,
        )

    @contextlib.asynccontextmanager
    async def apart(self) -> AsyncIterator[Caller]:
        """Lend a caller with connections of its own, for what must be said come what may.

        It stands in no line, and works when this one is closed.
        """
        other = copy.copy(self)
        other.closed = False
        other.places = Places(1)
        other.admission = other.pace = None
        other.transport = self.transport.apart()
        try:
            yield other
        finally:
            await other.aclose(None)

    def check_open(self) -> None:
        """Raise `ClientClosedError` if there can be no more calls."""
        if self.closed:
            raise ClientClosedError("The client is closed")

    async def encode(
        self, image: Any, *, max_pixels: int | None = None, max_bytes: int | None = None
    ) -> EncodedImage:
        """Prepare a picture, in a worker thread where it takes a while."""
        limit = self.max_pixels if max_pixels is None else max_pixels
        if max_bytes is None:
            if isinstance(image, EncodedImage) and limit is None:
                return image
            ready = encode_at_once(image, max_pixels=limit)
            if ready is not None:
                return ready
        more = {} if max_bytes is None else {"max_bytes": max_bytes}
        async with self.transport.pool().image_limiter:
            # Not in a thread of anyio's. That waits for the end of the task that began it, and
            # holds up the interpreter's where a Ctrl-C has left such a task behind.
            return await asyncio.to_thread(encode_image, image, max_pixels=limit, **more)

    def url(self, request: Request) -> URL:
        """Return where a request goes."""
        if request.elsewhere:
            return URL(request.path, encoded=True)
        base = self.endpoint.removesuffix("/v1") if request.at_root else self.endpoint
        return URL(base + request.path, encoded=True)

    def headers(self, accept: str, request: Request) -> dict[str, str]:
        """Return the headers of a request."""
        headers = {
            "User-Agent": USER_AGENT,
            "Accept": accept,
            # Answers are small, and a compressor on the way may hold back pieces of a stream.
            "Accept-Encoding": "identity",
        }
        if self.key is None or request.elsewhere:
            return headers
        if request.bearer:
            headers["Authorization"] = Secret(f"Bearer {self.key}")
        else:
            headers["X-Moondream-Auth"] = self.key
        return headers

    @property
    def secret(self) -> str:
        """What is to be taken out of a server's errors, where they quote it: the key.

        Nothing where that is so short that it stands in other words too; no real key is.
        """
        return self.key if self.key is not None and len(self.key) >= _SHORTEST_SECRET else ""

    def redact(self, data: bytes) -> bytes:
        """Take the secret out of an error's body. Answers are left alone."""
        return redact(data, self.secret)

    async def aclose(self, grace: float | None) -> None:
        """Refuse further calls, and close what is open in every loop."""
        self.closed = True
        await self.transport.aclose(grace)


class Call:
    """One call, over all its tries."""

    def __init__(
        self, caller: Caller, request: Request, *, max_retries: int, timeout: Timeout
    ) -> None:
        total = timeout.total
        self.total_at = None if total is None else running_loop().time() + total
        self._caller = caller
        self._request = request
        self._max_retries = max_retries
        self._timeout = timeout
        self._was_sent = False
        self._images: list[EncodedImage] | None = None
        self._failures = 0
        self._tries = 0
        self._began = time.monotonic()

    async def result(self) -> Result:
        """Return the whole answer of a skill; or raise the error that it says it is."""
        assert self._request.skill is not None  # noqa: S101 - for the type checker
        return await self._whole(partial(_decode_result, self._request.skill))

    async def json(self) -> dict[str, Any]:
        """Return the whole answer, decoded; or raise the error that it says it is."""
        return await self._whole(decode_json)

    async def record(self) -> dict[str, Any]:
        """Return the whole answer, decoded, whatever it says, or {} where it is empty.

        For records that may have a field ``error``, and acts with nothing to answer.
        """
        return await self._whole(_decode_record)

    async def _whole(self, decode: Callable[..., _Answer]) -> _Answer:
        try:
            answer = await self._try(partial(self._read, decode))
        except BaseException as error:
            self.ended(error=error)
            raise
        self.ended(completed=True, request_id=to_id(answer.get("request_id") or answer.get("id")))
        return answer

    async def opening(self) -> Opening:
        """Return what a stream starts from, once the server has accepted the request."""
        try:
            return await self._try(self._open)
        except BaseException as error:
            self.ended(error=error)
            raise

    async def download(self, after: MoondreamError | None = None) -> Body:
        """Return the body of the answer, to be read as it arrives, and closed; then say `ended`.

        Again, from its beginning, where reading it failed with `after` and another try
        can help; else raise that.
        """
        if after is not None and not await self._can_retry(after):
            raise after
        return await self._try(partial(self._send, accept="*/*"))

    # -- what hooks are told; a stream reports to its call --------------------------

    @property
    def observer(self) -> Call | None:
        """Whom a stream is to tell; None where there is no hook, so that the call can go."""
        hooks = self._caller.hooks
        return None if hooks.first_chunk is None and hooks.end is None else self

    def first_chunk(self, request_id: str | None) -> None:
        """Tell that the first piece of text is there."""
        self._tell("first_chunk", request_id=request_id)

    def ended(
        self,
        *,
        error: BaseException | None = None,
        completed: bool = False,
        request_id: str | None = None,
    ) -> None:
        """Tell that the call is over."""
        self._tell("end", error=error, completed=completed, request_id=request_id)

    def _tell(self, kind: str, **what: Any) -> None:
        hook = getattr(self._caller.hooks, kind)
        if hook is None:
            return
        event = CallEvent(
            skill=self._request.skill,
            stream=self._request.stream,
            attempt=self._tries,
            seconds=time.monotonic() - self._began,  # maybe after the loop's end
            **what,
        )
        try:
            hook(event)
        except Exception:  # noqa: BLE001 - whatever it is, it is not for the caller of this call
            _log.exception("A hook for %r failed", kind)

    async def reopen(self, error: MoondreamError) -> Opening:
        """Return what the stream goes on from after `error`, or raise that."""
        if not await self._can_retry(error):
            raise error
        return await self._try(self._open)

    async def _try(self, attempt: Callable[[Pool, _Deadline], Awaitable[_T]]) -> _T:
        while True:
            try:
                answer = await self._within_deadline(attempt)
            except MoondreamError as error:
                conceal(error, self._caller.secret)
                if self._is_refusal_to_stream(error):
                    self._request = self._request.without_stream()
                elif not await self._can_retry(error):
                    raise error  # noqa: TRY201 - a bare one, on 3.10, brings the frames back
            else:
                self._caller.budget.succeeded(after_retry=self._failures > 0)
                return answer

    def _is_refusal_to_stream(self, error: MoondreamError) -> bool:
        """Tell whether the server can't both think first and stream; kestrel says so with 400."""
        return (
            isinstance(error, APIStatusError)
            and error.status in (400, 422)
            and self._request.stream
            and self._request.payload.get("reasoning") is True
            and "stream" in error.message.lower()
        )

    async def _can_retry(self, error: MoondreamError) -> bool:
        """Wait until the next try may start; False if there is to be none."""
        if self._failures >= self._max_retries or not is_worth_retrying(error):
            return False
        if not self._request.repeatable and self._was_sent and not was_refused(error):
            return False
        retry_after = error.retry_after if isinstance(error, APIStatusError) else None
        delay = backoff(self._failures, random.random(), retry_after)  # noqa: S311 - no secret
        if self.total_at is not None and running_loop().time() + delay >= self.total_at:
            return False
        if not self._caller.budget.take():
            _log.debug("no retry: too many of this client's calls fail")
            return False
        self._failures += 1
        self._caller.count(retries=1)
        _log.debug("retry %d of %d in %.2f s: %s", self._failures, self._max_retries, delay, error)
        self._tell("retry", delay=delay, error=error)

        async def wait(_pool: Pool, _deadline: _Deadline) -> None:
            await anyio.sleep(delay)

        await self._within_deadline(wait)
        return True

    async def _within_deadline(self, step: Callable[[Pool, _Deadline], Awaitable[_T]]) -> _T:
        """Run a step of the call until it is done, its time is up, or the client is closed."""
        caller = self._caller
        caller.check_open()
        pool = caller.transport.pool()
        deadline = _Deadline(pool.loop, self._timeout, self.total_at)
        pool.calls.add(deadline.scope)  # which is cancelled when the client is closed
        try:
            with deadline.scope:
                return await step(pool, deadline)
        finally:
            deadline.cancel()
            pool.leave(deadline.scope)
        if caller.closed or pool.closed:
            raise ClientClosedError("The client was closed during the call")
        raise deadline.error(caller.places)

    async def _read(
        self, decode: Callable[..., _Answer], pool: Pool, deadline: _Deadline
    ) -> _Answer:
        body = await self._send(pool, deadline, accept="application/json")
        try:
            return self._decoded(partial(decode, status=body.status), await body.read())
        finally:
            body.close()

    def _decoded(self, decode: Callable[[bytes], _T], data: bytes) -> _T:
        with contextlib.suppress(APIStatusError):
            return decode(data)
        # Out here, so that the error with the key in it is not the context of this one; and
        # by the same name, so that no traceback finds it among the variables.
        data = self._caller.redact(data)
        return decode(data)

    async def _open(self, pool: Pool, deadline: _Deadline) -> Opening:
        skill = self._request.skill
        assert skill is not None  # noqa: S101 - only skills stream
        accept = "text/event-stream" if self._request.stream else "application/json"
        body = await self._send(pool, deadline, accept=accept)
        decoder = decoder_for(skill, secret=self._caller.secret)
        try:
            if await self._is_json(body):
                events = self._decoded(decoder.body, await body.read())
                return Opening(
                    decoder, events=events, sent_at=deadline.sent_at, headers=body.headers
                )
        except BaseException:
            body.close()
            raise
        waited = pool.loop.time() - deadline.sent_at
        return Opening(decoder, body, sent_at=deadline.sent_at, waited=waited, headers=body.headers)

    async def _is_json(self, body: Body) -> bool:
        """Tell JSON from events, where the server has said which, or else by the first byte.

        Raises:
            StreamProtocolError: It is neither.
        """
        kind = body.content_type
        if kind == "text/event-stream":
            return False
        if kind == "application/json" or kind.endswith("+json"):
            return True
        if kind not in ("", "text/plain", "application/octet-stream"):
            data = self._caller.redact(await body.read_error())
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

    async def _send(self, pool: Pool, deadline: _Deadline, *, accept: str) -> Body:
        """Send the request; return the body of an answer that is no error."""
        caller, request = self._caller, self._request
        self._was_sent = False
        if caller.admission is not None and not request.elsewhere:
            await caller.admission.wait()
        if not caller.places.take_at_once():
            deadline.enter("pool")
            await caller.places.take()
            deadline.enter(None)
        try:
            if self._images is None:
                self._images = [await caller.encode(each) for each in request.pictures]
            if caller.pace is not None and not request.elsewhere:
                await caller.pace.wait()
            deadline.enter("connect")
            self._tries += 1
            self._tell("request")
            parts = request.body(self._images)
            caller.count(requests=1, bytes_sent=size_on_wire(parts))
            body = await pool.request(
                request.method,
                caller.url(request),
                headers=caller.headers(accept, request),
                body=parts,
                on_send=partial(self._sending, deadline),
                on_close=caller.free_place,
                repeatable=request.repeatable,
                leave_origin=request.elsewhere,
            )
        except BaseException:
            caller.places.give_back()
            raise
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "%s %s: %d in %.3f s",
                request.method,
                request.path.partition("?")[0],  # what follows may be a signature
                body.status,
                pool.loop.time() - deadline.sent_at,
            )
        if 200 <= body.status < 300:
            return body
        try:
            data = caller.redact(await body.read_error())
        finally:
            body.close()
        raise error_from_response(body.status, body.headers, data, now=time.time())

    def _sending(self, deadline: _Deadline) -> None:
        self._was_sent = True
        deadline.sent()


class _Deadline:
    """The time limits of one try; `scope` is cancelled when one has run out.

    As with a stream's clock there is one timer at most, and it is moved only to an
    earlier time: when it goes off too early, it is set anew. The scope's own deadline
    would cost a new timer for each phase.
    """

    __slots__ = (
        "_at",
        "_loop",
        "_phase",
        "_rings_at",
        "_timeout",
        "_timer",
        "_total_at",
        "scope",
        "sent_at",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeout: Timeout, total_at: float | None
    ) -> None:
        self.scope = CancelScope()
        self.sent_at = loop.time()
        self._loop = loop
        self._timeout = timeout
        self._total_at = _NEVER if total_at is None else total_at
        self._phase: Phase = "total"
        self._timer: asyncio.Handle | None = None
        self._rings_at = _NEVER
        self._run_until(self._total_at, self.sent_at)

    def enter(self, phase: Phase | None) -> None:
        """Start the limit of a phase; None has none but the total."""
        limit = None if phase is None else getattr(self._timeout, phase)
        now = self._loop.time()
        at = _NEVER if limit is None else now + limit
        self._phase = "total" if phase is None or at >= self._total_at else phase
        self._run_until(min(at, self._total_at), now)

    def sent(self) -> None:
        """A connection stands and the request is on its way."""
        self.sent_at = self._loop.time()
        self.enter("first_event")

    def cancel(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # whose method leads back here

    def _run_until(self, at: float, now: float) -> None:
        self._at = at
        if at <= now:
            self.scope.cancel()
        elif at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(at, self._ring)
            self._rings_at = at

    def _ring(self) -> None:
        self._rings_at = _NEVER
        self._run_until(self._at, self._loop.time())

    def error(self, places: Places) -> APITimeoutError:
        """Return the error for the limit that ran out."""
        phase = self._phase
        limit = f"within {getattr(self._timeout, phase):g} seconds (Timeout.{phase})"
        message = {
            "pool": f"No connection became free {limit}: {places.taken} streams or calls are "
            f"open, of max_connections={places.total}",
            "connect": f"Could not connect {limit}",
            "first_event": f"The answer did not begin {limit}",
            "total": f"The call was not complete {limit}",
        }
        return APITimeoutError(message[phase], phase=phase)


def _decode_result(skill: Skill, body: bytes, *, status: int) -> Result:
    return read_result(skill, decode_json(body, status=status), status=status)


def _decode_record(body: bytes, *, status: int) -> dict[str, Any]:
    return decode_object(body, status=status) if body.strip() else {}
