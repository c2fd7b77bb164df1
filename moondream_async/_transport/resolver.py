"""Look up the addresses of host names, in threads of our own.

aiohttp uses the threads of the event loop, which the program may have filled with other work.
"""

from __future__ import annotations

import asyncio
import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from .workers import Workers

_LOOKUPS_AT_ONCE = 8  # a lookup may take half a minute if the DNS server does not answer

_lookups = Workers("names", _LOOKUPS_AT_ONCE)


class Resolver(AbstractResolver):
    """Asks the system's resolver, as Python does."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a host."""
        return await self.begin(host, port, family)

    def begin(
        self, host: str, port: int, family: socket.AddressFamily
    ) -> asyncio.Future[list[ResolveResult]]:
        """Begin to look up a host; the future gives its addresses."""
        return _lookups.submit(_resolve, host, port, family)

    async def close(self) -> None:
        """Do nothing: there is nothing to close."""


def _resolve(host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
    kind = socket.SOCK_STREAM
    try:
        found = socket.getaddrinfo(host, port, family, kind, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror:
        if host != "localhost":
            raise
        found = socket.getaddrinfo(host, port, family, kind)  # found also without a network
    results: list[ResolveResult] = []
    for each, _, protocol, _, address in found:
        name = str(address[0])
        if len(address) > 3 and address[3] and "%" not in name:
            name = f"{name}%{address[3]}"  # a link-local address, with the number of its link
        results.append(
            ResolveResult(
                hostname=host,
                host=name,
                port=int(address[1]),
                family=each,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
        )
    return results
