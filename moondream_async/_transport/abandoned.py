"""Connections of an event loop that is closed, or may never run again.

asyncio has no way to close a transport without its loop, and complains of those
that are left. Hence a look under the covers, here and nowhere else.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp


def close_connector(connector: aiohttp.BaseConnector) -> None:
    """Close the connector of a session and all its connections, in use or kept."""
    kept = [protocol for line in connector._conns.values() for protocol, _ in line]  # noqa: SLF001
    for protocol in (*kept, *connector._acquired):  # noqa: SLF001
        close_transport(protocol.transport)
    connector._close()  # noqa: SLF001


def close_response(response: aiohttp.ClientResponse) -> None:
    """Close the connection of an answer that is being read."""
    connection = response.connection
    if connection is not None:
        close_transport(connection.transport)
        with contextlib.suppress(RuntimeError):  # a reader can't be woken in a closed loop
            response.close()
        connection.close()


def close_transport(transport: Any) -> None:
    """Close a transport's socket, and that of the one below it where it does TLS."""
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    for each in filter(None, (transport, below)):
        if hasattr(each, "_closed"):
            each._closed = True  # noqa: SLF001
        sock = getattr(each, "_sock", None)
        if sock is None:
            continue
        loop = each._loop  # noqa: SLF001
        if not loop.is_closed():
            # Its selector must not keep the number of a file that will be another one.
            loop._remove_reader(sock.fileno())  # noqa: SLF001
            loop._remove_writer(sock.fileno())  # noqa: SLF001
        sock.close()
        # One that was about to close will look for its socket once more.
        if loop.is_closed() or not each._conn_lost:  # noqa: SLF001
            vars(each).update(_sock=None, _closing=True, _conn_lost=1)
