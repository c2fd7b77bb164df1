"""The server: it alone knows sockets, and the time.

The server receives a request, lets faults strike, asks the endpoint for an answer and
writes the answer at the simulator's rate, until the answer ends or the client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
from aiohttp import hdrs, web

from .batch import Batches
from .chat import Chat
from .dialects import DIALECTS
from .faults import Fault, FaultQueue
from .noise import logger
from .received import Connections, ReceivedRequest
from .script import Script
from .skills import Endpoints
from .steps import Auth, Body, Event, HangUp, Hold, Reply, Route, Step, Steps, Wait
from .storage import Storage
from .tuning import Tuning
from .validation import RefusedError

if TYPE_CHECKING:
    from typing import Self

# A picture of 10 MB is 13.4 MB of base64. A longer body is refused.
MAX_BODY_BYTES = 20 * 1024 * 1024
MAX_PART_BYTES = 100 * 1024 * 1024  # of the file of a batch

_ROUNDS_TO_ACCEPT = 5  # of the event loop; asyncio needs three

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class _CloseDelimitedResponse(web.StreamResponse):
    """A body of unknown length that is not chunked: it ends with the connection."""

    _length_check = False  # aiohttp's own switch; its WebSockets use it


class _HungUpError(ConnectionError):
    """The simulator closed the connection on purpose."""


_NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Simulator:
    """A server that speaks the Moondream API and describes what it measures in pictures.

    A simulator listens while it is entered; leaving ends open answers at once::

        async with Simulator(rate=0) as simulator:
            client = MoondreamClient(endpoint=simulator.endpoint)

    Or another server runs `app`, an `aiohttp.web.Application`. A simulator is entered, or
    its `app` run, once.

    Args:
        dialect: The server to speak like: ``cloud``, ``kestrel``, ``station`` or ``old``.
        rate: Tokens a second; 0 is as fast as possible.
        api_key: The only key that the cloud dialect lets in. With None it lets in any
            key, and requests without one.
        faults: What goes wrong, in this order; see `Fault`. More can be appended
            to `faults` at any time.
        host: The address to listen on.
        port: The port to listen on; 0 is any free one.
        ssl_context: Serves HTTPS with this.
        blank_lines: Ends every event with a blank line, as SSE requires. False leaves
            the blank lines out, as the documentation of the cloud does.
        keep: How many of the latest requests are remembered in `requests`.
        on_end: Called with each request that has ended.

    Attributes:
        app: The application.
        requests: The requests received, the oldest first.
        connections: Counts the connections `accepted` in all and `open` now.
        faults: What goes wrong next.
        script: The answers to give next, in place of measured ones.

    Raises:
        ValueError: There is no such dialect or fault.
    """

    def __init__(
        self,
        dialect: str = "cloud",
        rate: float = 0,
        api_key: str | None = None,
        faults: Iterable[Fault | str] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        ssl_context: ssl.SSLContext | None = None,
        blank_lines: bool = True,
        keep: int = 1000,
        on_end: Callable[[ReceivedRequest], object] | None = None,
    ) -> None:
        if dialect not in DIALECTS:
            raise ValueError(f"unknown dialect {dialect!r}; known are {', '.join(DIALECTS)}")
        self.dialect = DIALECTS[dialect](blank_lines=blank_lines)
        self.rate = rate
        self.faults = FaultQueue(faults)
        self.requests: list[ReceivedRequest] = []
        self.connections = Connections(self._notify)
        self.app = web.Application(
            client_max_size=MAX_BODY_BYTES, middlewares=[self._answer_unrouted]
        )
        self._api_key = api_key
        self._keep = keep
        self._on_end = on_end
        self._address = (host, port)
        self._ssl_context = ssl_context
        self._runner: web.AppRunner | None = None
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed: asyncio.Event | None = None
        self._limiter = anyio.CapacityLimiter(4)  # a picture may take half a gigabyte
        self._answering: set[asyncio.Task[Any] | None] = set()
        routes = self._routes()
        for route in routes:
            handler = functools.partial(self._receive, route)
            self.app.router.add_route(route.method, route.path, handler)
        skills = dict.fromkeys(route.skill for route in routes if route.skill)
        self.script = Script(tuple(skills), self._notify_soon)

    def __repr__(self) -> str:
        state = self.endpoint if self._runner else "not listening"
        return f"<Simulator {self.dialect.name}: {state}>"

    @property
    def endpoint(self) -> str:
        """The base URL for a client, as ``http://127.0.0.1:2020/v1``.

        Raises:
            RuntimeError: The simulator isn't listening.
        """
        return self.origin + self.dialect.prefix

    @property
    def origin(self) -> str:
        """The scheme, host and port it listens on.

        Raises:
            RuntimeError: The simulator isn't listening.
        """
        if self._runner is None:
            raise RuntimeError("the simulator isn't listening; use `async with Simulator(...)`")
        host, port = self._runner.addresses[0][:2]
        if host in {"0.0.0.0", "::"}:  # noqa: S104 - it listens everywhere; name one place
            host = "127.0.0.1"
        if ":" in host:
            host = f"[{host}]"
        return f"{'https' if self._ssl_context else 'http'}://{host}:{port}"

    async def __aenter__(self) -> Self:
        # With handler_cancellation a client that goes away ends its answer at once.
        runner = web.AppRunner(
            self.app, handler_cancellation=True, access_log=None, logger=logger, shutdown_timeout=1
        )
        await runner.setup()
        try:
            if runner.server is not None:
                self.connections.watch(runner.server)
            await web.TCPSite(runner, *self._address, ssl_context=self._ssl_context).start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing = True
        for task in filter(None, self._answering):
            task.cancel()
        if self._runner is not None:
            # asyncio leaves a connection open whose server is closed while it is accepted.
            for _ in range(_ROUNDS_TO_ACCEPT):
                await asyncio.sleep(0)
            await self._runner.cleanup()
            self._runner = None

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` is true; it is called again at every change.

        A change is a connection made or lost, a request received, held or ended, and an
        event sent::

            await simulator.wait_until(lambda: simulator.connections.open == 0)
        """
        # The loop is set before the condition is called: a change from another thread comes
        # either early enough for the condition, or late enough to find the loop.
        self._loop = asyncio.get_running_loop()
        while not condition():
            if self._changed is None:
                self._changed = asyncio.Event()
            await self._changed.wait()

    def _notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def _notify_soon(self) -> None:
        """Notify, from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a closed loop has no waiters
                self._loop.call_soon_threadsafe(self._notify)

    def _routes(self) -> list[Route]:
        routes = Endpoints(self.dialect).routes()
        if self.dialect.hosted:
            storage = Storage()
            routes += Chat(self.dialect).routes()
            routes += Batches(self.dialect, storage).routes()
            routes += Tuning(self.dialect, storage).routes()
            routes += storage.routes()
        return routes

    @web.middleware
    async def _answer_unrouted(
        self, request: web.Request, handler: Callable[[Any], Awaitable[Any]]
    ) -> web.StreamResponse:
        """Let faults strike also where there is no route: its handler raises aiohttp's error."""
        if request.match_info.http_exception is None:
            response: web.StreamResponse = await handler(request)
            return response
        return await self._receive(Route(request.method, request.path, handler, "none"), request)

    async def _receive(self, route: Route, request: web.Request) -> web.StreamResponse:
        """Remember a request, answer it, and notice when its client goes away."""
        connection = self.connections.number(request.protocol)
        received = ReceivedRequest(request, connection, self._limiter)
        self.requests.append(received)
        del self.requests[: max(0, len(self.requests) - self._keep)]
        self._notify()
        task = asyncio.current_task()
        self._answering.add(task)
        response: web.StreamResponse = web.Response()
        try:
            response = await self._respond(request, received, route)
        except asyncio.CancelledError:
            received.disconnected = not self._closing
            raise
        except ConnectionError as error:
            # A write failed, or a fault hung up. aiohttp finds the connection closed and gives up.
            received.disconnected = not isinstance(error, _HungUpError)
        finally:
            self._answering.discard(task)
            received.end()
            self._notify()
            if self._on_end is not None:
                self._on_end(received)
        return response

    async def _respond(
        self, request: web.Request, received: ReceivedRequest, route: Route
    ) -> web.StreamResponse:
        answer: Reply | Steps
        try:
            received.body = await self._read(request)
            wish = received.body.get("stream") if isinstance(received.body, dict) else None
            received.stream = bool(wish) if self.dialect.lenient else wish is True
            answer = await self._find_answer(request, received, route)
        except RefusedError as refused:
            answer = self.dialect.error(refused.status, refused.message, refused.param)
        except web.HTTPException as error:  # in the plain text of the real servers
            allow = {name: value for name, value in error.headers.items() if name == "Allow"}
            answer = Reply(error.status, error.reason, allow)
        scripted = received.scripted
        if isinstance(answer, Reply):
            for step in scripted.hold() if scripted else ():
                await self._carry_out(step, request, received)
            return await self._send(request, received, answer)
        if received.fault is not None:
            answer = received.fault.spoil(answer)
        if scripted is not None:
            answer = scripted.pause(answer)
        return await self._stream(request, received, answer)

    async def _find_answer(
        self, request: web.Request, received: ReceivedRequest, route: Route
    ) -> Reply | Steps:
        """Return a fault's reply, a refusal, or the answer of a script or of the endpoint."""
        received.fault = self.faults.take(request.path, stream=received.stream)
        reply = await self._strike(request, received) or self._refuse(request, route.auth)
        if reply is not None:
            return reply
        received.scripted = self.script.take(route.skill) if route.skill else None
        fault = received.scripted.fault if received.scripted else None
        if received.fault is None and fault and fault.matches(request.path, stream=received.stream):
            received.fault = fault
            reply = await self._strike(request, received)
        answer = reply or route.endpoint(received)
        if isinstance(answer, Awaitable):
            answer = await answer
        return Reply(body=answer) if isinstance(answer, dict) else answer

    async def _strike(self, request: web.Request, received: ReceivedRequest) -> Reply | None:
        """Do what a request's fault does before the answer; return its reply, if it has one."""
        if received.fault is None:
            return None
        for step in received.fault.before():
            await self._carry_out(step, request, received)
        if received.fault.has("json"):
            received.stream = False
        return received.fault.reply()

    async def _read(self, request: web.Request) -> Any:
        """Return the decoded body, as the dialect reads bodies, or the bytes of an upload.

        Raises:
            RefusedError: The body is too long, or not JSON.
        """
        is_upload = request.method == "PUT" and self.dialect.hosted
        if is_upload:
            request = request.clone(client_max_size=MAX_PART_BYTES)
        try:
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise RefusedError("Request body is too large", status=413) from None
        except web.RequestPayloadError:
            raise RefusedError("Request body could not be decoded") from None
        if self.dialect.lenient:
            return await _merge(request, data)
        if is_upload or not data:
            return data if is_upload else None
        content_type = request.headers.get(hdrs.CONTENT_TYPE)
        if self.dialect.checks_content_type and content_type != "application/json":
            raise RefusedError("Content-Type must be application/json")
        try:
            return msgspec.json.decode(data)
        except _NO_JSON:
            raise RefusedError("Request body must be valid JSON") from None

    def _refuse(self, request: web.Request, auth: Auth) -> Reply | None:
        """Return the reply to a client that isn't let in, or None for a client that is."""
        if auth == "none" or not self.dialect.hosted:
            return None
        # The gateway before the cloud turns Python's own client away, before any key is looked at.
        agent = request.headers.get(hdrs.USER_AGENT, "")
        if not agent or agent.startswith("Python-urllib"):
            return Reply(403, "error code: 1010")
        if self._api_key is None:
            return None
        own = request.headers.get("X-Moondream-Auth") == self._api_key
        given = request.headers.get(hdrs.AUTHORIZATION)
        bearer = given == f"Bearer {self._api_key}"
        if {"key": own, "bearer": own or bearer, "optional": bearer or given is None}[auth]:
            return None
        if auth == "optional":
            return Reply(401, {"error": "Invalid API key"})
        return self.dialect.error(401, "Invalid API key")

    async def _send(
        self, request: web.Request, received: ReceivedRequest, reply: Reply
    ) -> web.Response:
        body, content_type = reply.body, reply.content_type
        if body is None:
            body = self.dialect.error(reply.status, f"Simulated error {reply.status}").body
        if isinstance(body, dict):
            body, content_type = _encode(body), "application/json"
        data = body.encode() if isinstance(body, str) else body or b""
        headers = {hdrs.CONTENT_TYPE: content_type} | reply.headers
        response = web.Response(status=reply.status, body=data, headers=headers)
        received.status = reply.status
        received.stream = False
        await response.prepare(request)
        await response.write_eof()
        received.bytes_sent = len(data)  # aiohttp's `body_length` has the headers, too
        return response

    async def _stream(
        self, request: web.Request, received: ReceivedRequest, steps: Steps
    ) -> web.StreamResponse:
        """Write a stream's steps at the simulator's rate."""
        response = web.StreamResponse(headers=_STREAM_HEADERS)
        if self.dialect.closes_connections:
            response = _CloseDelimitedResponse(headers=_STREAM_HEADERS)
            response.force_close()
        received.status = response.status
        await response.prepare(request)
        clock = asyncio.get_running_loop().time
        due = clock()  # absolute, so that late wake-ups don't add up
        for step in steps:
            if not isinstance(step, Event):
                await self._carry_out(step, request, received)
                continue
            if self.rate:
                due += step.tokens / self.rate
            await asyncio.sleep(max(0.0, due - clock()))
            await response.write(step.data)
            received.events_sent += 1
            received.bytes_sent += len(step.data)
            self._notify()
        await response.write_eof()
        return response

    async def _carry_out(self, step: Step, request: web.Request, received: ReceivedRequest) -> None:
        if isinstance(step, Hold):
            received.held = True
            self._notify()
            try:
                await self.wait_until(step.released)
            finally:
                received.held = False
        elif isinstance(step, HangUp):
            _hang_up(request.transport, reset=step.reset)
            raise _HungUpError
        elif isinstance(step, Wait) and step.seconds is not None:
            await asyncio.sleep(step.seconds)
        elif isinstance(step, Wait):
            await asyncio.Event().wait()  # until the client goes away


def _encode(body: Body) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # half a surrogate pair, for which UTF-8 has no bytes
        return json.dumps(body).encode()


async def _merge(request: web.Request, data: bytes) -> dict[str, Any]:
    """Merge query string, form and JSON, as Station does; overlook what can't be decoded."""
    try:
        form = dict(await request.post())
    except (ValueError, LookupError):  # not a form, or of an unknown encoding
        form = {}
    try:
        decoded = msgspec.json.decode(data)
    except _NO_JSON:
        decoded = {}
    if not isinstance(decoded, dict):
        raise web.HTTPInternalServerError
    return dict(request.query) | form | decoded


def _hang_up(transport: asyncio.Transport | None, *, reset: bool) -> None:
    if transport is not None and reset:
        # Lingering for zero seconds makes the kernel send RST in place of FIN.
        linger = struct.pack("ii", 1, 0)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    elif transport is not None:
        transport.close()
