"""A pool of connections for each event loop.

A client may be used from several event loops, one after the other or at once. Connections belong
to the loop that made them, so each loop has a `Pool`, made on first use. At its end,
``asyncio.run`` closes the asynchronous generators of its loop. Each pool keeps such a generator,
which closes the pool with the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import aiohttp
import anyio
from aiohttp import hdrs
from multidict import CIMultiDict
from yarl import URL

from moondream_async.errors import APIStatusError, ClientClosedError, MoondreamError, RequestError

from .bodies import READ_BUFFER_BYTES, Body
from .faults import FAULTS_OF_SENDING, is_disconnect, translate
from .private import close_connector, count_idle, disown, middlewares_of, use_protocol
from .proxies import NO_PROXIES, Proxies
from .resolver import Resolver
from .sockets import Guard, begin, end, open_socket
from .unseen import Unseen
from .uploads import Part, Upload
from .workers import ShortJobs, Workers

if TYPE_CHECKING:
    import ssl

    from moondream_async._protocol.secret import Secret

_short = Workers("short jobs", 4)

NO_SECRETS: Mapping[str, Secret] = {}

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

_MAX_HEAD_BYTES = 64 * 1024  # limit of one header of an answer: gateways add long headers

_LOOK = 0.005  # seconds between two looks at the loop of another thread
_RESTS = 5  # looks in a row that find a loop not running; asyncio.run starts its loop repeatedly
_PATIENCE = 5.0  # seconds that a busy loop of another thread may take to close its connections

# The client has its own deadlines: aiohttp's don't tell their phase, nor events from heartbeats.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)


class Transport:
    """The connections of one client, in all event loops."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession | None = None,
        ssl_context: ssl.SSLContext | None = None,
        proxies: Proxies = NO_PROXIES,
        guard: Callable[[URL], Guard | None] | None = None,
    ) -> None:
        if session is not None and not isinstance(session, aiohttp.ClientSession):
            raise RequestError(f"session must be an aiohttp.ClientSession, not {session!r:.100}")
        self._session = session
        self._ssl_context = ssl_context
        self._proxies = proxies
        self._guard = guard
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        self._lock = threading.RLock()  # `_call.limits` says why the same thread may take it again
        self._closed = False
        _all.add(self)

    def pool(self) -> Pool:
        """Return the pool of the running loop; drop pools whose loop is closed.

        Raises:
            ClientClosedError: The client was closed.
        """
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is not None and not pool.closed:
            return pool
        with self._lock:
            if self._closed:  # another thread has closed it meanwhile
                raise ClientClosedError("The client is closed")
            gone = [self._pools.pop(other) for other in list(self._pools) if other.is_closed()]
            self._pools[loop] = pool = Pool(
                loop,
                session=self._session,
                ssl_context=self._ssl_context,
                proxies=self._proxies,
                guard=self._guard,
            )
        for each in gone:
            each.abandon()
        return pool

    def apart(self) -> Transport:
        """Return a transport with the same options and its own connections."""
        return Transport(
            session=self._session,
            ssl_context=self._ssl_context,
            proxies=self._proxies,
            guard=self._guard,
        )

    @property
    def idle_connections(self) -> int:
        """How many connections are idle."""
        with self._lock:
            return sum(pool.idle_connections for pool in self._pools.values())

    def disown(self) -> None:
        """Release the pools of the parent process, in a forked child."""
        self._lock = threading.RLock()
        for pool in self._pools.values():
            pool.disown()
        self._pools = {}

    async def aclose(self, grace: float | None = None) -> None:
        """Close all connections in every loop that still exists."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        here = asyncio.get_running_loop()
        async with anyio.create_task_group() as group:
            for pool in pools:
                close = pool.aclose if pool.loop is here else pool.aclose_from_elsewhere
                group.start_soon(close, grace)
        with self._lock:
            self._pools.clear()

    def __del__(self) -> None:
        try:
            unclosed = [pool.drop() for pool in getattr(self, "_pools", {}).values()]
        except ImportError:  # the interpreter ends, and asyncio is in debug mode
            return
        if any(unclosed):  # at the end, since a warning may raise
            warnings.warn(
                "A MoondreamClient was dropped while it had connections. "
                "Use 'async with', or aclose() it.",
                ResourceWarning,
                stacklevel=2,
            )


class Closable(Protocol):
    """A call that waits."""

    def close(self) -> None:
        """End the call, since the client is closed; called in the call's loop."""


class Pool:
    """The connections of one event loop, and its open calls and bodies."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        session: aiohttp.ClientSession | None,
        ssl_context: ssl.SSLContext | None,
        proxies: Proxies = NO_PROXIES,
        guard: Callable[[URL], Guard | None] | None = None,
    ) -> None:
        self.loop = loop
        self.closed = False
        self.calls: set[Closable] = set()
        """The open calls of this loop, which are closed with the client."""
        self.short_jobs = ShortJobs(_short)
        self.bodies: set[Body] = set()
        self._ssl = ssl_context or True
        self._proxies = proxies
        self._guard = guard
        self._owns_session = session is None
        if session is None:
            connector = aiohttp.TCPConnector(
                limit=0, socket_factory=open_socket, resolver=Resolver()
            )
            use_protocol(connector, loop)
            session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=_NO_TIMEOUT
            )
        self._session = session
        # The middlewares of a caller's session: aiohttp drops them if a request brings others.
        self._middlewares = middlewares_of(self._session)
        self._used: weakref.WeakSet[asyncio.BaseProtocol] = weakref.WeakSet()
        self._idle: asyncio.Event | None = None  # set at the end of the last call or body
        self._lifeline = _close_with_loop(weakref.ref(self))
        with contextlib.suppress(StopIteration):  # runs up to its yield, without a wait
            self._lifeline.__anext__().send(None)

    @property
    def idle_connections(self) -> int:
        """How many connections are idle."""
        connector = self._session.connector
        if not self._owns_session or connector is None:
            return 0
        return count_idle(connector)

    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        secrets: Mapping[str, Secret] = NO_SECRETS,
        body: Sequence[Part] = (),
        size: int | None = None,
        on_send: Callable[[Upload], None],
        on_close: Callable[[int], None],
        repeatable: bool = True,
        leave_origin: bool = False,
        max_redirects: int = _MAX_REDIRECTS,
    ) -> Body:
        """Send a request; return its answer when the headers have arrived.

        Redirects within the origin are followed, with the same method and body. If an idle
        connection turns out to be closed, the request is sent again on a new one, once.

        Args:
            method: The method, as ``POST``.
            url: The address.
            headers: The headers, without those that describe the body.
            secrets: Further headers that only the server may see.
            body: The parts of the body.
            size: The size of the body in bytes, if it was counted.
            on_send: Called when the request is being sent over a connection, and again when
                the last byte of a large body was sent.
            on_close: Called once with the number of bytes of the answer's body, when its
                connection was given back or dropped; not called if this method raises.
            repeatable: Whether the request may be sent again on a new connection if an idle
                one turns out to be closed.
            leave_origin: Whether to follow redirects to other origins, for requests that hold
                no secret of one server.
            max_redirects: The limit of redirects; 0 returns a redirect as an answer.

        Raises:
            APIConnectionError: No connection was made, or it was lost before the answer.
            APIStatusError: A redirect can't be followed.
        """
        on_new = False
        redirects = 0
        while True:
            guard = None if self._guard is None else self._guard(url)
            proxy = self._proxies.for_url(url)
            middlewares = self._middlewares
            if secrets or proxy is not None:
                for_proxy = None if proxy is None else proxy.authorization
                middlewares = (*middlewares, Unseen(secrets, for_proxy))
            # Also for an empty body: aiohttp calls `write` when it has a connection.
            upload = Upload(body, self._used, on_send, on_new=on_new, size=size)
            guarding = None if guard is None else begin(guard)
            try:
                response = await self._session.request(
                    method,
                    url,
                    data=upload,
                    headers=headers,
                    middlewares=middlewares,
                    skip_auto_headers=None if body else (hdrs.CONTENT_TYPE,),
                    allow_redirects=False,
                    raise_for_status=False,  # a caller's session may have other values of these two
                    auto_decompress=True,
                    timeout=_NO_TIMEOUT,
                    read_bufsize=READ_BUFFER_BYTES,
                    max_line_size=_MAX_HEAD_BYTES,
                    max_field_size=_MAX_HEAD_BYTES,
                    ssl=self._ssl,
                    proxy=None if proxy is None else proxy.url,
                )
            except FAULTS_OF_SENDING as error:
                self._check(error, url, guard)
                if upload.refused:  # nothing was sent, and that idle connection is gone
                    continue
                if not (upload.reused and repeatable and is_disconnect(error)):
                    raise translate(error, url) from error
                # The server had closed the idle connection, and can't have seen the request.
                on_new = True
                continue
            finally:
                upload.end()
                if guarding is not None:
                    end(guarding)
            if response.status == 408 and upload.reused and repeatable:
                # On a connection that was idle for too long, 408 means "closing".
                response.close()
                on_new = True
                continue
            location = response.headers.get(hdrs.LOCATION)
            if response.status not in _REDIRECTS or location is None or not max_redirects:
                return Body(self, response, on_close)
            response.close()
            if redirects == max_redirects:
                raise _status_error("The server redirects in circles", response)
            redirects += 1
            url = _follow(method, url, response, location, leave_origin=leave_origin)

    def _check(self, error: BaseException, url: URL, guard: Guard | None) -> None:
        """Raise our error for a failure to send that the connection did not cause."""
        if self.closed:
            raise ClientClosedError("The client was closed during the call") from error
        if isinstance(error.__cause__, MoondreamError):  # the uploaded file could not be read
            raise error.__cause__ from None
        if guard is not None and guard.refused is not None:
            raise guard.error(url) from error

    async def aclose(self, grace: float | None = None) -> None:
        """Close all connections; open calls and bodies get a `ClientClosedError`.

        Cancelling it ends the `grace`; the connections are closed all the same.
        """
        try:
            if grace and (self.calls or self.bodies):
                if self._idle is None or self._idle.is_set():
                    self._idle = asyncio.Event()
                with anyio.move_on_after(grace):
                    await self._idle.wait()
        finally:
            self.closed = True
            for call in self.calls.copy():
                call.close()
            for body in self.bodies.copy():
                body.close(by_client=True)
            with anyio.CancelScope(shield=True):
                if self._owns_session:
                    await self._session.close()
                with contextlib.suppress(RuntimeError):  # the loop is ending, and closes it
                    await self._lifeline.aclose()
                await asyncio.sleep(0)  # the transports of the bodies close in this round

    async def aclose_from_elsewhere(self, grace: float | None = None) -> None:
        """Close the pool from another loop; the pool's own loop may stop at any moment.

        A loop that has stopped reports nothing, so its state is polled. No task is started in
        it, since a loop that ends drops new tasks.
        """
        try:
            with anyio.move_on_after(grace or 0):
                await self._look_until(lambda: not self.calls and not self.bodies)
        finally:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self.loop.call_soon_threadsafe(self._cut)
        with anyio.move_on_after(_PATIENCE):
            await self._look_until(lambda: self.closed)
        if not self.loop.is_running():
            self.abandon()

    def disown(self) -> None:
        """Release all connections without closing them: they belong to the parent process."""
        connector = self._session.connector
        if self._owns_session and connector is not None:
            disown(connector)
        for body in self.bodies:
            body.disown()
        self.closed = True
        _of_parents.append(self)

    async def _look_until(self, is_done: Callable[[], bool]) -> None:
        """Poll until `is_done` holds, or the loop does not run any more."""
        rests = 0
        while not is_done() and not self.loop.is_closed() and rests < _RESTS:
            rests = 0 if self.loop.is_running() else rests + 1
            await anyio.sleep(_LOOK)

    def _cut(self) -> None:
        for call in self.calls.copy():
            call.close()
        self.abandon()

    def leave(self, call: Closable) -> None:
        """Remove a call that has ended."""
        self.calls.discard(call)
        if self._idle is not None:
            self._note_end(self._idle)

    def discard(self, body: Body) -> None:
        """Remove a body that has ended."""
        self.bodies.discard(body)
        if self._idle is not None:
            self._note_end(self._idle)

    def _note_end(self, idle: asyncio.Event) -> None:
        if not self.calls and not self.bodies and not self.loop.is_closed():
            idle.set()

    def drop(self) -> bool:
        """Close the pool of a dropped client, from any thread; return whether it was still open."""
        too_soon = self._owns_session and not self.closed and not self.loop.is_closed()
        if self.loop.is_running():
            # Without a task: a loop that ends cancels new tasks before their first step.
            self.loop.call_soon_threadsafe(self.abandon)
        else:
            self.abandon()
        return too_soon

    def abandon(self) -> None:
        """Close all connections at once and silently, even if the loop is closed or stopped."""
        self.closed = True
        for body in self.bodies.copy():
            body.abandon()
        connector = self._session.connector
        if self._owns_session and connector is not None and not connector.closed:
            self._session.detach()
            close_connector(connector)
        with contextlib.suppress(StopIteration, RuntimeError):  # it ends without a wait
            self._lifeline.aclose().__await__().send(None)


_all: weakref.WeakSet[Transport] = weakref.WeakSet()
_of_parents: list[Pool] = []
"""The pools of parent processes, kept: freeing them would touch sockets that a parent uses."""


def _disown_all() -> None:
    for transport in tuple(_all):
        transport.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_all)


async def _close_with_loop(pool: weakref.ref[Pool]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        living = pool()
        if living is not None and not living.closed:
            living.closed = True  # so that closing the session does not close the pool again
            for body in living.bodies.copy():
                body.close(by_client=True)
            if living._owns_session:  # noqa: SLF001 - a part of the pool
                await living._session.close()  # noqa: SLF001
            await asyncio.sleep(0)


def _follow(
    method: str,
    url: URL,
    response: aiohttp.ClientResponse,
    location: str,
    *,
    leave_origin: bool,
) -> URL:
    """Return the address that a redirect leads to, if it may be followed."""
    try:
        # A signed address is valid only exactly as it is written.
        target = url.join(URL(location, encoded=leave_origin))
        origin = target.origin()
        _check_can_be_written(str(target))
    except ValueError as error:
        raise _status_error("The server redirects to no valid address", response) from error
    if leave_origin and url.scheme == "https" != target.scheme:
        raise _status_error(f"The server redirects to {origin}, without TLS", response)
    if not leave_origin and origin != url.origin():
        raise _status_error(
            f"The server redirects to {origin}. That is another origin than the endpoint's, so "
            "it is not followed; set endpoint= to it if it is right.",
            response,
        )
    if response.status == 303 and method != hdrs.METH_GET:
        raise _status_error(
            f"The server redirects a {method} to a GET, which would lose the request", response
        )
    return target


def _check_can_be_written(address: str) -> None:
    if not (address.isascii() and address.isprintable()) or " " in address:
        raise ValueError("a character that an address can't have")


def _status_error(message: str, response: aiohttp.ClientResponse) -> APIStatusError:
    return APIStatusError(message, status=response.status, headers=CIMultiDict(response.headers))
