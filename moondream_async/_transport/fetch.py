"""Pictures from the web, for programs that are handed addresses by strangers.

A web backend that fetches what its users name can be made to fetch from the
inside of its own network. So private, loopback and link-local addresses are
refused: after names are resolved, so that a name can't hide one, at each
redirect, and for the very address that is then connected to.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from moondream_async.errors import APITimeoutError, ImageError, RequestError
from moondream_async.types import EncodedImage

if TYPE_CHECKING:
    import ssl

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


async def fetch_image(
    url: str,
    *,
    max_bytes: int = 20_000_000,
    timeout: float = 30.0,
    allow: Sequence[str] = (),
    max_pixels: int | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> EncodedImage:
    """Fetch a picture from the web and prepare it for any number of calls.

    Only addresses that are reachable from the whole internet are connected to, also
    after a redirect and however a name resolves. At most five redirects are followed.
    Cancelling it drops the connection.

    Args:
        url: An ``http`` or ``https`` address.
        max_bytes: How much is read at most.
        timeout: Seconds for all of it.
        allow: Networks that may be connected to besides, as ``10.1.0.0/16``.
        max_pixels: As for ``encode_image``.
        ssl_context: For servers whose certificate the system doesn't know.

    Raises:
        ImageError: The address can't be or is refused, there is nothing, it is no
            picture, or too large a one.
        APIConnectionError: The connection could not be made, or was lost.
        APITimeoutError: It took longer than `timeout`; `phase` is ``total``.
    """
    from anyio import move_on_after, to_thread  # noqa: PLC0415 - importing the package stays light

    from moondream_async._images import encode_image  # noqa: PLC0415

    try:
        networks = [ipaddress.ip_network(each) for each in allow]
    except ValueError as error:
        raise RequestError(f"allow must name networks, as '10.1.0.0/16': {error}") from error
    with move_on_after(timeout):
        data = await _fetch(_checked(url, networks), max_bytes, networks, ssl_context)
        encode = partial(encode_image, data, max_pixels=max_pixels)
        try:
            return await to_thread.run_sync(encode, abandon_on_cancel=True)
        except ImageError as error:
            raise ImageError(f"{_shown(url)}: {error}") from error.__cause__
    raise APITimeoutError(
        f"{_shown(url)} was not fetched within {timeout:g} seconds", phase="total"
    )


async def _fetch(
    url: str, max_bytes: int, networks: Sequence[Network], ssl_context: ssl.SSLContext | None
) -> bytes:
    from .fetching import fetch  # noqa: PLC0415 - loads aiohttp

    reaches = partial(_may_reach, networks=networks)
    for _ in range(_MAX_REDIRECTS + 1):
        async with fetch(url, may_reach=reaches, ssl_context=ssl_context) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                url = _checked(urljoin(url, response.headers["Location"]), networks)
                continue
            if not 200 <= response.status < 300:
                raise ImageError(f"{_shown(url)} gives no picture, but status {response.status}")
            kind = response.content_type
            if not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
                raise ImageError(f"{_shown(url)} gives no picture, but {kind}")
            data = bytearray()
            async for part in response:
                data += part
                if len(data) > max_bytes:
                    raise ImageError(f"{_shown(url)} is larger than {max_bytes} bytes")
            return bytes(data)
    raise ImageError(f"{_shown(url)} redirects more than {_MAX_REDIRECTS} times")


def _checked(url: str, networks: Sequence[Network]) -> str:
    """Refuse what can be refused by the address as it is written."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port  # reading the port checks it
    except ValueError as error:
        raise ImageError(f"{_shown(url)} is no valid address: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise ImageError(f"{_shown(url)} is no http or https address")
    if parts.username is not None:
        raise ImageError(f"{_shown(url)} has a user in it, which is not sent")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return url  # a name; what it resolves to is checked then
    if not _may_reach(str(address), networks=networks):
        raise ImageError(f"{_shown(url)} is not on the public internet")
    return url


def _may_reach(address: str, *, networks: Sequence[Network]) -> bool:
    """Say whether an IP address is public, or in one of the networks.

    >>> _may_reach("1.1.1.1", networks=()), _may_reach("10.0.0.1", networks=())
    (True, False)
    >>> _may_reach("::ffff:127.0.0.1", networks=()), _may_reach("64:ff9b::7f00:1", networks=())
    (False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip.version == network.version and ip in network for network in networks):
        return True
    public = ip.is_global and not ip.is_multicast
    return public and all(_may_reach(str(each), networks=networks) for each in _carried(ip))


def _carried(ip: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address stands for, on the ways there are."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    carried: list[Address | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in ipaddress.IPv6Network("64:ff9b::/96"):  # NAT64, RFC 6052
        carried.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [each for each in carried if each is not None]


def _shown(url: str) -> str:
    return url if len(url) <= 200 else f"{url[:200]}..."
