"""Connections of an event loop that is closed, or may never run again.

asyncio has no way to close a transport without its loop, and complains of those
that are left. Hence a look under the covers, here and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    import aiohttp


def close_connector(connector: aiohttp.BaseConnector) -> None:
    """Close the connector of a session and all its connections, in use or kept."""
    kept = [protocol for line in connector._conns.values() for protocol, _ in line]  # noqa: SLF001
    for protocol in (*kept, *connector._acquired):  # noqa: SLF001
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
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    parts = [each for each in (transport, below) if each is not None]
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


def _hang_up(transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
    """End a connection whose socket is not to be had, as uvloop's: the server is told now.

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
