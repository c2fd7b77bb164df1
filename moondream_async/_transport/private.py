"""Private names of aiohttp and asyncio: all that are used are used here, each for a reason.

- A connection on which anything arrived that was not asked for must never be used again (RFC
  9112, 9.2). aiohttp looks at a connection only when it is given back, hence a protocol of
  ours (`Protocol`), which its connector has to be given (``_factory``), and which watches what
  comes when (``data_received``, ``feed_data``, ``set_response_params``).
- aiohttp raises ahead of what it still holds (``_read_nowait``).
- Middlewares that are given for a request stand in for a session's own (``_middlewares``).
- There is no public count of the connections that wait (``_conns``).
- asyncio has no way to close a transport without its loop, and complains of those that are left
  (``_acquired``, ``_close``, ``_loop``, ``_sock``, ``_conn_lost``, ...). A loop may be closed, may
  never run again, or may be that of the process that this one was forked from.

- anyio loads what it needs for asyncio at the first await, and would hold up the loop
  (``anyio._backends._asyncio``).

`tests/test_private_names.py` says which of them a new version has moved.
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
    """aiohttp's end of a connection, which takes one answer for each request, and no more."""

    _answer: Any = None  # the body of the answer to the latest request, once its head is there
    _is_chunked = False
    looks: Any = None
    """What `is_quiet` asks of the socket, kept from the first time."""

    def set_response_params(self, **params: Any) -> None:
        """Expect an answer: a request is about to be sent."""
        self._answer = None
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Take what arrived; close the connection if nobody had asked for it."""
        if self._answer is None:
            # What is wrong behind an answer must not take the answer with it: head first.
            end = data.find(b"\r\n\r\n") + 4
            if end < 4 or end >= len(data):
                super().data_received(data)
                return
            super().data_received(data[:end])
            data = data[end:]
        if not data or self._answer is None:  # none where reading is only resumed
            super().data_received(data)
        elif self._answer.is_eof():
            self._refuse()
        elif self._is_chunked and b"\n0" not in data and data[:1] not in b"\r\n0":
            super().data_received(data)  # the last chunk, which is of size 0, is not in there
        else:
            # Its last byte by itself: it is one too many if the answer was whole without it.
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
        """Take a head with its body; one behind the answer is nobody's."""
        message, body = data
        if self._answer is not None:
            self.force_close()
            return
        if message.code >= 200 or message.code == 101:
            self._answer = body
            self._is_chunked = message.chunked
        super().feed_data(data, size)


def use_protocol(connector: aiohttp.BaseConnector, loop: asyncio.AbstractEventLoop) -> None:
    """Have a connector make its connections with `Protocol`."""
    make: Any = functools.partial(Protocol, loop=loop)
    connector._factory = make  # noqa: SLF001


def is_quiet(protocol: Any) -> bool:
    """Tell whether nothing has arrived on a connection between two requests, nor its end.

    The event loop may not yet have read what has, so the socket is asked.
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
    kept: tuple[int, Any] | None = getattr(protocol, "looks", None)  # a caller's has none
    if kept is None or kept[0] != number:
        poll = select.poll()
        poll.register(number, select.POLLIN)
        kept = protocol.looks = (number, poll)
    return not kept[1].poll(0)


_HAS_POLL = hasattr(select, "poll")  # Windows has none


def held(response: aiohttp.ClientResponse) -> bytes:
    """Return what of a body has arrived and was not read, also behind a fault."""
    return response.content._read_nowait(-1)  # noqa: SLF001


def count_idle(connector: aiohttp.BaseConnector) -> int:
    """Return how many connections wait for the next request."""
    return sum(map(len, tuple(connector._conns.values())))  # noqa: SLF001


def protocols(connector: aiohttp.BaseConnector) -> Iterator[Any]:
    """Yield what all connections of a connector are known by, in use or kept."""
    for line in connector._conns.values():  # noqa: SLF001
        for protocol, _ in line:
            yield protocol
    yield from connector._acquired  # noqa: SLF001


def disown(connector: aiohttp.BaseConnector) -> None:
    """Release connections that belong to the process that this one was forked from.

    What they are known by in the event loop, whose selector both processes share, is not
    touched. Only this process's hold on each socket ends, so that the other end hears of it
    when the parent closes it.
    """
    with Path(os.devnull).open("rb") as nothing:
        for protocol in protocols(connector):
            for part in _parts(getattr(protocol, "transport", None)):
                sock = part.get_extra_info("socket")
                if sock is not None and sock.fileno() >= 0:
                    os.dup2(nothing.fileno(), sock.fileno())


def close_connector(connector: aiohttp.BaseConnector) -> None:
    """Close the connector of a session and all its connections, in use or kept."""
    for protocol in tuple(protocols(connector)):
        close_transport(protocol.transport, connector._loop)  # noqa: SLF001
    connector._close()  # noqa: SLF001


def close_response(response: aiohttp.ClientResponse) -> None:
    """Close the connection of an answer that is being read."""
    connection = response.connection
    if connection is not None:
        close_transport(connection.transport, response._loop)  # noqa: SLF001
        with contextlib.suppress(RuntimeError):  # a reader can't be woken in a closed loop
            response.close()
        connection.close()


def close_transport(transport: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Close a transport's socket, and that of the one below it where it does TLS."""
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
            # Its selector must not keep the number of a file that will be another one.
            each._loop._remove_reader(sock.fileno())  # noqa: SLF001
            each._loop._remove_writer(sock.fileno())  # noqa: SLF001
        sock.close()
        # One that was about to close will look for its socket once more.
        if loop.is_closed() or not each._conn_lost:  # noqa: SLF001
            vars(each).update(_sock=None, _closing=True, _conn_lost=1)


def _parts(transport: Any) -> list[Any]:
    """Return a transport and the one below it where it does TLS."""
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return [each for each in (transport, below) if each is not None]


def _hang_up(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
    """End a connection whose socket is not to be had, as uvloop's: the server notices now.

    Its loop lets go of it when it runs again, or has done so when it was closed.
    """
    if loop.is_closed() or transport.is_closing():
        return
    with (
        socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as sock,
        contextlib.suppress(OSError),  # the server was first
    ):
        sock.shutdown(socket.SHUT_RDWR)
    loop.call_soon_threadsafe(transport.abort)


def middlewares_of(session: aiohttp.ClientSession) -> tuple[aiohttp.ClientMiddlewareType, ...]:
    """Return the middlewares that a session was made with."""
    return tuple(session._middlewares)  # noqa: SLF001
