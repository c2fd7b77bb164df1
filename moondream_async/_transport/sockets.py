"""The sockets of connections, and the guard that checks their addresses.

aiohttp asks this module for a socket, with the IP address to connect to. So a guard checks the
real address, however the host was written and whatever it resolved to.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING

from .addresses import Address, parse

if TYPE_CHECKING:
    from aiohttp import AddrInfoType
    from yarl import URL

    from moondream_async.errors import MoondreamError

# A model may think for minutes without sending a byte, and NAT routers drop a connection that
# is idle for five minutes or less.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Guard:
    """Lets sockets be opened to some addresses only, for one request.

    Args:
        allows: Tells whether an address may be connected to.
        error: Makes the error for a refused request, from its URL and the refused address.
    """

    def __init__(
        self, allows: Callable[[Address], bool], error: Callable[[URL, str], MoondreamError]
    ) -> None:
        self._allows = allows
        self._error = error
        self.refused: str | None = None
        """The last address that was refused."""

    def error(self, url: URL) -> MoondreamError:
        """Return the error for a request that was refused."""
        return self._error(url, self.refused or "")

    def check(self, host: str) -> None:
        """Raise `OSError` if a socket must not be connected to an address."""
        address = parse(host)
        if address is None or not self._allows(address):
            self.refused = host
            raise PermissionError(f"{host} is not allowed")


_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)


def begin(guard: Guard) -> Token[Guard | None]:
    """Let `guard` check the connections that are made until `end`."""
    return _guard.set(guard)


def end(begun: Token[Guard | None]) -> None:
    """End the checks of the guard that `begin` has set."""
    _guard.reset(begun)


def open_socket(info: AddrInfoType) -> socket.socket:
    """Return a socket for an address; aiohttp's connector calls this function."""
    family, kind, protocol, _, address = info
    guard = _guard.get()
    if guard is not None:
        guard.check(str(address[0]))
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # each system has some of them
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock
