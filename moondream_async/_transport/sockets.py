"""The sockets that connections are made of, and the guard that judges where they lead.

A guard sees the very address that is connected to, whatever the host was written like
and whatever it resolved to: aiohttp asks here for a socket, with that address.
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

# A model may think for minutes without a byte on the line, and routers that translate
# addresses forget an idle connection after five minutes or less.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Guard:
    """Lets sockets be opened to some addresses only, for one request.

    Args:
        allows: Tells which addresses.
        error: Makes the error to raise where none was, of where the request was to go
            and of the address that was refused.
    """

    def __init__(
        self, allows: Callable[[Address], bool], error: Callable[[URL, str], MoondreamError]
    ) -> None:
        self._allows = allows
        self._error = error
        self.refused: str | None = None
        """The last address that was not let through."""

    def error(self, url: URL) -> MoondreamError:
        """Return the error for a request that could not be sent."""
        return self._error(url, self.refused or "")

    def check(self, host: str) -> None:
        """Raise `OSError` if a socket must not be connected to an address."""
        address = parse(host)
        if address is None or not self._allows(address):
            self.refused = host
            raise PermissionError(f"{host} is not allowed")


_guard: ContextVar[Guard | None] = ContextVar("guard", default=None)


def begin(guard: Guard) -> Token[Guard | None]:
    """Have `guard` judge the connections that are made from here on, up to `end`."""
    return _guard.set(guard)


def end(begun: Token[Guard | None]) -> None:
    """Have them judged as before."""
    _guard.reset(begun)


def open_socket(info: AddrInfoType) -> socket.socket:
    """Return a socket to connect to an address; what aiohttp's connector calls."""
    family, kind, protocol, _, address = info
    guard = _guard.get()
    if guard is not None:
        guard.check(str(address[0]))
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):  # each system knows some of them
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock
