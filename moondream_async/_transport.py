"""Connections: a pool for each event loop, requests out, bodies in.

Alone in this package it imports aiohttp's client, and nothing of aiohttp leaves
it: what goes wrong is translated here into this package's errors, with the
original as the cause.

A client may be used from several event loops, one after the other or at once.
Connections belong to the loop that made them, so each loop has a `Pool`, made
on first use. When ``asyncio.run`` ends, it closes the asynchronous generators
of its loop; each pool keeps one for just that, and is closed with its loop.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import errno
import socket
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import aiohttp
import aiohttp.abc
import aiohttp.resolver
import anyio
from aiohttp import hdrs
from yarl import URL

from ._files import FileSlice
from ._protocol import MAX_BODY_BYTES, USER_AGENT
from .errors import (
    APIConnectionError,
    APIStatusError,
    ClientClosedError,
    ImageError,
    MoondreamError,
)
from .types import EncodedImage

if TYPE_CHECKING:
    import ssl

    from typing_extensions import Self

Part = bytes | EncodedImage | FileSlice
"""A part of a body: an image goes out as a data URL in quotes."""

READ_BUFFER_BYTES = 64 * 1024
"""aiohttp stops reading from the socket at twice this much, until a reader has taken it."""

_SLICE_BYTES = 48 * 1024  # of a picture, encoded at once while sending: 64 KiB of base64
_SMALL_BODY_BYTES = 64 * 1024  # a body up to here goes out in one piece, with the headers
_LINGER = 0.25  # seconds that a complete answer may wait for the end of its body
_ERROR_BODY_BYTES = 64 * 1024
_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# The client keeps its own deadlines; aiohttp's would neither name their phase nor
# know an event from a heartbeat.
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)

# aiohttp's readers raise RuntimeError when the connection is gone before they wait.
_FAULTS = (aiohttp.ClientError, OSError, RuntimeError, asyncio.IncompleteReadError)


class Transport:
    """The connections of one client, whichever loops they belong to."""

    def __init__(
        self,
        *,
        session: aiohttp.ClientSession | None = None,
        ssl_context: ssl.SSLContext | None = None,
        proxy: str | None = None,
    ) -> None:
        self._session = session
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        self._lock = threading.Lock()
        self._closed = False

    def pool(self) -> Pool:
        """Return the running loop's pool; pools whose loop is gone are dropped.

        Raises:
            ClientClosedError: There is none yet, and there will be none.
        """
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is not None and not pool.closed:
            return pool
        with self._lock:
            if self._closed:  # since the caller looked, by another thread
                raise ClientClosedError("The client is closed")
            for other in [other for other in self._pools if other.is_closed()]:
                self._pools.pop(other).abandon()
            self._pools[loop] = pool = Pool(
                loop, session=self._session, ssl_context=self._ssl_context, proxy=self._proxy
            )
        return pool

    def apart(self) -> Transport:
        """Return one that goes the same ways, over connections of its own."""
        return Transport(session=self._session, ssl_context=self._ssl_context, proxy=self._proxy)

    @property
    def idle_connections(self) -> int:
        """How many connections wait for the next request."""
        with self._lock:
            return sum(pool.idle_connections for pool in self._pools.values())

    async def aclose(self, grace: float | None = None) -> None:
        """Close what is open in every live loop."""
        with self._lock:
            self._closed = True
            pools = list(self._pools.values())
        here = asyncio.get_running_loop()
        async with anyio.create_task_group() as group:
            for pool in pools:
                if pool.loop is here:
                    group.start_soon(pool.aclose, grace)
                elif pool.loop.is_running():
                    group.start_soon(_aclose_elsewhere, pool, grace)
                else:
                    pool.abandon()
        with self._lock:
            self._pools.clear()

    def __del__(self) -> None:
        unclosed = [pool.drop() for pool in getattr(self, "_pools", {}).values()]
        if any(unclosed):  # warned of at the end, since that may raise
            warnings.warn(
                "A MoondreamClient was dropped while it had connections. "
                "Use 'async with', or aclose() it.",
                ResourceWarning,
                stacklevel=2,
            )


async def _aclose_elsewhere(pool: Pool, grace: float | None) -> None:
    future = asyncio.run_coroutine_threadsafe(pool.aclose(grace), pool.loop)
    # If that loop stops just now, nobody will ever complete the future.
    with anyio.move_on_after((grace or 0) + 5):
        await asyncio.wrap_future(future)


class Pool:
    """The connections of one event loop, and the calls and bodies under way on it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        session: aiohttp.ClientSession | None,
        ssl_context: ssl.SSLContext | None,
        proxy: str | None,
        resolver: aiohttp.abc.AbstractResolver | None = None,
    ) -> None:
        self.loop = loop
        self.closed = False
        self.calls: set[anyio.CancelScope] = set()
        """What waits on this loop; cancelled when the client is closed."""
        self.bodies: set[Body] = set()
        self.image_limiter = anyio.CapacityLimiter(4)
        """Pictures that are prepared at once: each may hold a decoded copy."""
        self._ssl = ssl_context or True
        self._proxy = proxy
        self._owns_session = session is None
        self._session = session or aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=resolver),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=_NO_TIMEOUT,
        )
        self._used: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._idle = asyncio.Event()
        self._lifeline = _close_with_loop(weakref.ref(self))
        with contextlib.suppress(StopIteration):  # up to its yield; it doesn't wait on the way
            self._lifeline.__anext__().send(None)

    @property
    def idle_connections(self) -> int:
        """How many connections wait for the next request."""
        connector = self._session.connector
        if not self._owns_session or connector is None:
            return 0
        kept = tuple(connector._conns.values())  # noqa: SLF001 - there is no public count
        return sum(map(len, kept))

    async def request(
        self,
        method: str,
        url: URL,
        *,
        headers: dict[str, str],
        body: Sequence[Part] = (),
        on_send: Callable[[], None],
        on_close: Callable[[int], None],
        repeatable: bool = True,
        leave_origin: bool = False,
    ) -> Body:
        """Send a request; return once the server has answered with its headers.

        Redirects within the origin are followed, with method and body as they are.
        `on_send` is called when a connection stands, and again as the pieces of a
        file go out; `on_close` once, when the answer's connection is free again, with
        the number of bytes that came in the body, but not if this raises.

        Args:
            method: As ``POST``.
            url: Where to.
            headers: All of them but those that describe the body.
            body: The parts of the body.
            on_send: See above.
            on_close: See above.
            repeatable: Whether it may go out again, on a new connection, when one that
                was kept turns out to be closed.
            leave_origin: Whether to follow redirects to other origins. For requests
                with nothing in them that is meant for one server alone.

        Raises:
            APIConnectionError: No connection, or it was lost before the answer.
            APIStatusError: A redirect that can't be followed.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            response = await self._send(method, url, headers, body, on_send, repeatable=repeatable)
            location = response.headers.get(hdrs.LOCATION)
            if response.status not in _REDIRECTS or location is None:
                return Body(self, response, on_close)
            response.close()
            url = _follow(method, url, response.status, location, leave_origin=leave_origin)
        raise APIStatusError("The server redirects in circles", status=response.status)

    async def _send(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        body: Sequence[Part],
        on_send: Callable[[], None],
        *,
        repeatable: bool = True,
    ) -> aiohttp.ClientResponse:
        while True:
            upload = _Upload(body, self._used, on_send) if body else None
            if upload is None:
                on_send()
            try:
                return await self._session.request(
                    method,
                    url,
                    data=upload,
                    headers=headers,
                    allow_redirects=False,
                    raise_for_status=False,  # these two: a session of the caller's may differ
                    auto_decompress=True,
                    timeout=_NO_TIMEOUT,
                    read_bufsize=READ_BUFFER_BYTES,
                    ssl=self._ssl,
                    proxy=self._proxy,
                )
            except _FAULTS as error:
                if self.closed:
                    raise ClientClosedError("The client was closed during the call") from error
                if isinstance(error.__cause__, MoondreamError):  # of a file that is sent
                    raise error.__cause__ from None
                # The server had already closed a connection that was kept for it, and
                # can't have seen the request. Each round uses up one such connection.
                reused = upload is not None and upload.reused
                if reused and repeatable and _is_disconnect(error):
                    continue
                raise _translate(error, url) from error

    async def aclose(self, grace: float | None = None) -> None:
        """Close all connections; what still waits or reads gets a `ClientClosedError`.

        Cancelling it ends the `grace`: it closes all the same.
        """
        try:
            if grace and (self.calls or self.bodies):
                self._idle.clear()
                with anyio.move_on_after(grace):
                    await self._idle.wait()
        finally:
            self.closed = True
            for scope in tuple(self.calls):
                scope.cancel()
            for body in tuple(self.bodies):
                body.close(by_client=True)
            with anyio.CancelScope(shield=True):
                if self._owns_session:
                    await self._session.close()
                await self._lifeline.aclose()
                await asyncio.sleep(0)  # the transports of the bodies close in this round

    @contextlib.contextmanager
    def cancelled_on_close(self, scope: anyio.CancelScope) -> Iterator[None]:
        """Cancel `scope` when the client is closed meanwhile."""
        self.calls.add(scope)
        try:
            yield
        finally:
            self.calls.discard(scope)
            self._note_end()

    def discard(self, body: Body) -> None:
        """Forget a body that has ended."""
        self.bodies.discard(body)
        self._note_end()

    def _note_end(self) -> None:
        if not self.calls and not self.bodies and not self.loop.is_closed():
            self._idle.set()

    def drop(self) -> bool:
        """Close, when the client was dropped; from any thread. Return whether that was too soon."""
        if self.closed or self.loop.is_closed():
            self.abandon()
            return False
        self.loop.call_soon_threadsafe(lambda: self.loop.create_task(self.aclose()))
        return self._owns_session

    def abandon(self) -> None:
        """Let go of everything, without noise, when the loop is gone."""
        self.closed = True
        for body in tuple(self.bodies):
            body.abandon()
        connector = self._session.connector
        if not self._owns_session or connector is None or connector.closed:
            return
        self._session.detach()
        # asyncio has no way to close a transport without its loop, and complains of
        # those that are left. Hence a look under the covers, of both libraries.
        protocols = [kept for line in connector._conns.values() for kept, _ in line]  # noqa: SLF001
        for protocol in (*protocols, *connector._acquired):  # noqa: SLF001
            _close_without_loop(protocol.transport)
        connector._close()  # noqa: SLF001


async def _close_with_loop(pool: weakref.ref[Pool]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        living = pool()
        if living is not None and not living.closed:
            living.closed = True  # so that aclose() on its way does not come back here
            for body in tuple(living.bodies):
                body.close(by_client=True)
            if living._owns_session:  # noqa: SLF001 - a part of the pool
                await living._session.close()  # noqa: SLF001
            await asyncio.sleep(0)


def _close_without_loop(transport: Any) -> None:
    """Close a transport's socket, and that of the one below it where it does TLS."""
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    for each in (transport, below):
        if hasattr(each, "_closed"):
            vars(each)["_closed"] = True
        sock = getattr(each, "_sock", None)
        if sock is not None:
            sock.close()
            vars(each)["_sock"] = None


class Body:
    """The body of one answer, as bytes that arrive; what a stream reads from."""

    def __init__(
        self, pool: Pool, response: aiohttp.ClientResponse, on_close: Callable[[int], None]
    ) -> None:
        self.status = response.status
        self.headers = response.headers
        self.closed = False
        """Whether its connection is free again or dropped."""
        self._pool = pool
        self._response = response
        self._on_close = on_close
        self.received = 0
        """Bytes, so far."""
        self._closed_by_client = False
        self._unread = b""
        pool.bodies.add(self)

    @property
    def content_type(self) -> str:
        """As ``text/event-stream``; "" where the server didn't say."""
        return self.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """Return what has arrived, and wait if that is nothing.

        Cancelling it loses nothing. What arrived before a fault comes before it.
        """
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        content = self._response.content
        try:
            data = await content.readany()
        except _FAULTS as error:
            if not self.closed:
                # aiohttp raises ahead of what it still holds; there is no public way
                # to that.
                data = content._read_nowait(-1)  # noqa: SLF001
                if data:
                    self.received += len(data)
                    return data
            by_client = self._closed_by_client
            self.close()
            if by_client:
                raise ClientClosedError("The client was closed during the call") from error
            raise APIConnectionError(f"The connection was lost: {_say(error)}") from error
        if data:
            self.received += len(data)
            return data
        self._settle()
        raise StopAsyncIteration

    def unread(self, data: bytes) -> None:
        """Put bytes back, to be read next."""
        self._unread = data + self._unread

    async def read(self, limit: int = MAX_BODY_BYTES) -> bytes:
        """Return the whole body.

        Raises:
            APIConnectionError: The connection was lost, or the body passed `limit` bytes.
        """
        parts: list[bytes] = []
        size = 0
        async for data in self:
            size += len(data)
            if size > limit:
                self.close()
                raise APIConnectionError(
                    f"The server's reply is over the limit of {limit} bytes", permanent=True
                )
            parts.append(data)
        return b"".join(parts)

    async def read_error(self) -> bytes:
        """Return as much of an error's body as can be had and is worth having."""
        data = b""
        try:
            async for part in self:
                data += part
                if len(data) > _ERROR_BODY_BYTES:
                    break
        except APIConnectionError:
            pass  # the status says enough
        self.close()
        return data[:_ERROR_BODY_BYTES]

    async def finish(self) -> None:
        """Wait, shortly, for the end of the body, so that its connection can be kept."""
        content = self._response.content
        # wait_eof() would wait for ever on a body that has failed already.
        if not self.closed and not content.is_eof() and content.exception() is None:
            timer = self._pool.loop.call_later(_LINGER, self.close)
            try:
                await content.wait_eof()
            except _FAULTS:
                pass  # the answer is complete; only the connection is lost
            finally:
                timer.cancel()
        self.close()

    def close(self, *, by_client: bool = False) -> None:
        """Free the connection now; from any thread. One that is still in use is dropped."""
        if self.closed:
            return
        self._closed_by_client = by_client
        loop = self._pool.loop
        if loop.is_closed():
            self._pool.abandon()
        elif _is_running_here(loop) or not loop.is_running():
            self._close()
        else:
            loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if self.closed:
            return
        connection = self._response.connection
        if connection is not None and connection.transport is not None:
            # Not close(): that would first send what is left of an upload, and say
            # goodbye over TLS.
            connection.transport.abort()
        self._response.close()
        self._settle()

    def abandon(self) -> None:
        """Give back what is held outside the loop."""
        self._settle()

    def _settle(self) -> None:
        if not self.closed:
            self.closed = True
            self._pool.discard(self)
            self._on_close(self.received)


def _is_running_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


class _Upload(aiohttp.payload.Payload):
    """A body written piece by piece, with base64 made of each picture on the way.

    So a picture of 5 MB costs its 5 MB while it is sent, and neither a copy in
    base64 nor one in JSON, and a file of any size a few pieces; and no step of it
    holds the event loop for long.
    """

    _autoclose = True

    def __init__(
        self,
        parts: Sequence[Part],
        used: weakref.WeakSet[asyncio.BaseTransport],
        on_send: Callable[[], None],
    ) -> None:
        is_file = any(isinstance(part, FileSlice) for part in parts)
        kind = "application/octet-stream" if is_file else "application/json"
        super().__init__(parts, content_type=kind)
        self._parts = parts
        self._size = sum(map(size_on_wire, parts))
        self._used = used
        self._on_send = on_send
        self.reused = False
        """Whether it went to a connection that an earlier request had used."""

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._pieces()).decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        transport = writer.transport
        if transport is not None:  # else it is lost already, and the first write says so
            self.reused = transport in self._used
            self._used.add(transport)
        self._on_send()
        for part in self._parts:
            if isinstance(part, FileSlice):
                async for piece in part:
                    await writer.write(piece)
                    self._on_send()  # a slow line is no server that does not answer
                return
        if self._size is not None and self._size <= _SMALL_BODY_BYTES:
            await writer.write(b"".join(self._pieces()))
            return
        for piece in self._pieces():
            await writer.write(piece)
            await asyncio.sleep(0)  # write() gives way only when the socket is full

    def _pieces(self) -> Any:
        for part in self._parts:
            if isinstance(part, EncodedImage):
                yield f'"data:{part.media_type};base64,'.encode()
                view = memoryview(part.data)
                for start in range(0, len(view), _SLICE_BYTES):
                    yield binascii.b2a_base64(view[start : start + _SLICE_BYTES], newline=False)
                yield b'"'
            else:
                yield part


def size_on_wire(part: Part) -> int:
    """Return how many bytes a part of a body is when it is sent."""
    if isinstance(part, bytes):
        return len(part)
    if isinstance(part, FileSlice):
        return part.size
    return len(f'"data:{part.media_type};base64,"') + (len(part.data) + 2) // 3 * 4


def _follow(method: str, url: URL, status: int, location: str, *, leave_origin: bool) -> URL:
    """Return where to ask again."""
    try:
        # A signed address holds only as it is written.
        target = url.join(URL(location, encoded=leave_origin))
        origin = target.origin()
    except ValueError as error:
        raise APIStatusError("The server redirects to no valid address", status=status) from error
    if leave_origin and url.scheme == "https" != target.scheme:
        raise APIStatusError(f"The server redirects to {origin}, without TLS", status=status)
    if not leave_origin and origin != url.origin():
        raise APIStatusError(
            f"The server redirects to {origin}. That is another origin than the endpoint's, so "
            "it is not followed; set endpoint= to it if it is right.",
            status=status,
        )
    if status == 303 and method != hdrs.METH_GET:
        raise APIStatusError(
            "The server redirects a POST to a GET, which would lose the request", status=status
        )
    return target


def _is_disconnect(error: BaseException) -> bool:
    if isinstance(error, aiohttp.ClientConnectorError):
        return False
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    # What a read raises, and what a write raises, wrapped by aiohttp and mostly without errno.
    return any(
        isinstance(each, ConnectionError)
        or (isinstance(each, OSError) and each.errno in (errno.ECONNRESET, errno.EPIPE))
        for each in (error, error.__cause__)
    )


def _translate(error: BaseException, url: URL) -> MoondreamError:
    """Turn what aiohttp raises before the answer into one of our errors."""
    where = str(url.origin())
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return APIConnectionError(
            f"The certificate of {where} can't be trusted: {_say(error.certificate_error)}",
            permanent=True,
        )
    if isinstance(error, aiohttp.InvalidURL):
        return APIConnectionError(f"{where} is no valid address: {_say(error)}", permanent=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return APIConnectionError(
            f"The proxy refused the connection to {where}: {error.status} {error.message}"
        )
    if isinstance(error, aiohttp.ClientConnectorError):
        return APIConnectionError(f"Could not connect to {where}: {_say(error.os_error)}")
    if isinstance(error, aiohttp.ClientResponseError):
        return APIConnectionError(f"What {where} answered is not HTTP: {error.message}")
    return APIConnectionError(f"The connection to {where} was lost: {_say(error)}")


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__


class _GuardedResolver(aiohttp.abc.AbstractResolver):
    """Resolves names, and lets through only the addresses that may be reached."""

    def __init__(self, may_reach: Callable[[str], bool]) -> None:
        self._resolver = aiohttp.resolver.DefaultResolver()
        self._may_reach = may_reach

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[aiohttp.abc.ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        allowed = [each for each in found if self._may_reach(each["host"])]
        if not allowed:
            raise _RefusedAddressError(f"{host} is not on the public internet")
        return allowed

    async def close(self) -> None:
        await self._resolver.close()


class _RefusedAddressError(OSError):
    """A name resolves to nothing that may be reached."""


@contextlib.asynccontextmanager
async def fetch(
    url: str, *, may_reach: Callable[[str], bool], ssl_context: ssl.SSLContext | None
) -> AsyncGenerator[Body, None]:
    """GET an address, once, over a connection of its own, without a key or a cookie.

    Names are resolved to addresses for which `may_reach` holds, or refused. An
    address that stands in the URL itself is for the caller to check.

    Raises:
        ImageError: The name resolves to an address that may not be reached.
        APIConnectionError: The connection could not be made, or was lost.
    """
    resolver = _GuardedResolver(may_reach)
    pool = Pool(
        asyncio.get_running_loop(),
        session=None,
        ssl_context=ssl_context,
        proxy=None,
        resolver=resolver,
    )
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
    try:
        response = await pool._send("GET", URL(url), headers, (), lambda: None)  # noqa: SLF001
        yield Body(pool, response, lambda _: None)
    except APIConnectionError as error:
        cause = error.__cause__
        refusal = (
            cause if isinstance(cause, aiohttp.InvalidURL) else getattr(cause, "os_error", None)
        )
        if isinstance(refusal, (_RefusedAddressError, aiohttp.InvalidURL)):
            raise ImageError(str(refusal)) from error
        raise
    finally:
        await pool.aclose()
        await resolver.close()
