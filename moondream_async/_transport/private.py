"""The private names of aiohttp, asyncio and anyio that the package uses, each with its reason.

- A connection on which bytes arrived without a request must never be used again (RFC 9112,
  9.2). aiohttp checks a connection only when it is given back. So its connector makes our own
  `Protocol` (``_factory``), which checks all bytes as they arrive (``data_received``,
  ``feed_data``, ``set_response_params``).
- aiohttp raises an error before it hands out the bytes that had arrived (``_read_nowait``).
- The middlewares of a request replace those of its session (``_middlewares``).
- There is no public count of idle connections (``_conns``).
- asyncio can't close a transport without its loop, and warns of transports that are left open
  (``_acquired``, ``_close``, ``_loop``, ``_sock``, ``_conn_lost``, ...). The loop may be closed,
  may never run again, or may belong to the parent process after a fork.
- anyio imports its backend at the first await, which would block the loop
  (``anyio._backends._asyncio``).

`tests/test_private_names.py` tells which of these names a new version has moved.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio._backends._asyncio  # noqa: F401 - see above
from aiohttp.client_proto import ResponseHandler

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

    import aiohttp


class Protocol(ResponseHandler):
    """aiohttp's protocol of a connection, with one answer for each request, and no more."""

    _answer: Any = None  # the body of the last request's answer, when its head has come
    _is_chunked = False
    looks: Any = None
    """The poll object that `is_quiet` has made for the socket."""

    def set_response_params(self, **params: Any) -> None:
        """Expect an answer: a request is about to be sent."""
        self._answer = None
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Take bytes that arrived; close the connection if no request had asked for them."""
        if self._answer is None:
            # The head first: wrong bytes behind an answer must not spoil the answer.
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end >= len(data) or _is_whole_answer(data, end):
                super().data_received(data)
                return
            super().data_received(data[:end])
            data = data[end:]
        if not data or self._answer is None:  # no data: reading is resumed
            super().data_received(data)
        elif self._answer.is_eof():
            self._refuse()
        elif self._is_chunked and b"\n0" not in data and data[:1] not in b"\r\n0":
            super().data_received(data)  # without the last chunk, whose size is 0
        else:
            # The last byte separately: if the answer is complete without it, it is one too many.
            super().data_received(data[:-1])
            if self._answer.is_eof():
                self._refuse()
            else:
                super().data_received(data[-1:])

    def _refuse(self) -> None:
        self.force_close()
        if self.transport is not None:
            self.transport.close()

    def feed_data(self, data: Any, size: int = 0) -> None:
        """Take the head of an answer with its body; refuse a second answer."""
        message, body = data
        if self._answer is not None:
            self.force_close()
            return
        if message.code >= 200 or message.code == 101:
            self._answer = body
            self._is_chunked = message.chunked
        super().feed_data(data, size)


def _is_whole_answer(data: bytes, end: int) -> bool:
    """Tell whether an answer whose head ends at `end` is in there, and nothing else.

    As most plain answers come; any doubt is False.
    """
    if not data.startswith(b"HTTP/1.1 200 "):
        return False
    head = data[:end].lower()
    name = b"\r\ncontent-length:"
    if head.count(name) != 1 or b"\r\ntransfer-encoding" in head:
        return False
    begin = head.index(name) + len(name)
    return head[begin : head.index(b"\r\n", begin)].strip() == b"%d" % (len(data) - end)


def use_protocol(connector: aiohttp.BaseConnector, loop: asyncio.AbstractEventLoop) -> None:
    """Let a connector make its connections with `Protocol`."""
    make: Any = functools.partial(Protocol, loop=loop)
    connector._factory = make  # noqa: SLF001


def is_quiet(protocol: Any) -> bool:
    """Tell whether a connection is open and has no bytes to read, between two requests.

    The event loop may not have read the bytes yet, so the socket is polled.
    """
    transport = protocol.transport
    if protocol.should_close or transport is None or transport.is_closing():
        return False
    sock = transport.get_extra_info("socket")
    if sock is None:
        return True
    number = sock.fileno()
    if number < 0:
        return False
    if not _HAS_POLL:
        return not select.select([number], [], [], 0)[0]
    poll = getattr(protocol, "looks", None)  # aiohttp's has none
    if poll is None:
        poll = protocol.looks = select.poll()
        poll.register(number, select.POLLIN)
    return not poll.poll(0)


_HAS_POLL = hasattr(select, "poll")  # Windows has none


def held(response: aiohttp.ClientResponse) -> bytes:
    """Return the bytes of a body that have arrived and were not read, even after an error."""
    return response.content._read_nowait(-1)  # noqa: SLF001


def count_idle(connector: aiohttp.BaseConnector) -> int:
    """Return how many connections wait for the next request."""
    return sum(map(len, tuple(connector._conns.values())))  # noqa: SLF001


def protocols(connector: aiohttp.BaseConnector) -> Iterator[Any]:
    """Yield the protocols of all connections of a connector, in use or idle."""
    for line in connector._conns.values():  # noqa: SLF001
        for protocol, _ in line:
            yield protocol
    yield from connector._acquired  # noqa: SLF001


def disown(connector: aiohttp.BaseConnector) -> None:
    """Release connections that belong to the parent process.

    Their entries in the event loop are not touched, since both processes share its selector. Only
    this process's handle of each socket is closed, so that the server notices when the parent
    closes the connection.
    """
    with Path(os.devnull).open("rb") as nothing:
        for protocol in protocols(connector):
            for part in _parts(getattr(protocol, "transport", None)):
                sock = part.get_extra_info("socket")
                if sock is not None and sock.fileno() >= 0:
                    os.dup2(nothing.fileno(), sock.fileno())


def close_connector(connector: aiohttp.BaseConnector) -> None:
    """Close the connector of a session and all its connections, in use or idle."""
    for protocol in tuple(protocols(connector)):
        close_transport(protocol.transport, connector._loop)  # noqa: SLF001
    connector._close()  # noqa: SLF001


def close_response(response: aiohttp.ClientResponse) -> None:
    """Close the connection of an unfinished answer."""
    connection = response.connection
    if connection is not None:
        close_transport(connection.transport, response._loop)  # noqa: SLF001
        with contextlib.suppress(RuntimeError):  # a reader can't be woken in a closed loop
            response.close()
        connection.close()


def close_transport(transport: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close the socket of a transport, and of the transport below it if it does TLS."""
    parts = _parts(transport)
    if parts and not any(hasattr(each, "_sock") for each in parts):
        _hang_up(transport, loop)
    for each in parts:
        if hasattr(each, "_closed"):
            each._closed = True  # noqa: SLF001
        sock = getattr(each, "_sock", None)
        if sock is None:
            continue
        if not loop.is_closed():
            # The selector must not keep the file number, which another file will get.
            each._loop._remove_reader(sock.fileno())  # noqa: SLF001
            each._loop._remove_writer(sock.fileno())  # noqa: SLF001
        sock.close()
        # A transport that is already closing needs its `_sock` once more.
        if loop.is_closed() or not each._conn_lost:  # noqa: SLF001
            vars(each).update(_sock=None, _closing=True, _conn_lost=1)


def _parts(transport: Any) -> list[Any]:
    """Return a transport, and with TLS the transport below it."""
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return [each for each in (transport, below) if each is not None]


def _hang_up(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
    """End a connection without access to its socket object, as with uvloop.

    The server notices at once. The loop frees the transport when it runs again, or has done so
    when it was closed.
    """
    if loop.is_closed() or transport.is_closing():
        return
    with (
        socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock,
        contextlib.suppress(OSError),  # the server has closed it
    ):
        sock.shutdown(socket.SHUT_RDWR)
    loop.call_soon_threadsafe(transport.abort)


def middlewares_of(session: aiohttp.ClientSession) -> tuple[aiohttp.ClientMiddlewareType, ...]:
    """Return the middlewares of a session."""
    return tuple(session._middlewares)  # noqa: SLF001
