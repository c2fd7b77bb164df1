"""Pictures from the web, for programs that get addresses from strangers.

A stranger can make a web backend fetch from inside of its own network, by naming an address
there. So only public addresses are connected to, also after each redirect; the check is made on
the IP address that the socket is connected to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from ipaddress import ip_network
from typing import TYPE_CHECKING
from urllib.parse import urljoin

from moondream_async._checks import check_count, check_positive, check_ssl_context
from moondream_async.errors import APITimeoutError, ImageError, RequestError
from moondream_async.types import EncodedImage

from .addresses import Network, is_public, shown

if TYPE_CHECKING:
    import ssl

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


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

    Only addresses that the whole internet can reach are connected to, also after a redirect and
    whatever a name resolves to. No proxy is used, since the address that a proxy connects to is
    not known here. At most five redirects are followed. Cancelling drops the connection.

    Args:
        url: An ``http`` or ``https`` address.
        max_bytes: The limit of the picture's file.
        timeout: The limit of the whole call, in seconds.
        allow: Further networks that may be connected to, as ``10.1.0.0/16``.
        max_pixels: As for ``encode_image``.
        ssl_context: For servers whose certificate the system doesn't know.

    Raises:
        RequestError: An argument other than `url` is wrong.
        ImageError: The address is invalid or refused, or it gives no picture, or the picture
            is too large.
        APIConnectionError: The connection could not be made, or was lost.
        APITimeoutError: It took longer than `timeout`; `phase` is ``total``.

    >>> asyncio.run(md.fetch_image("http://192.168.0.1/photo.jpg"))
    Traceback (most recent call last):
        ...
    moondream_async.errors.ImageError: ...
    """
    from anyio import move_on_after, to_thread  # noqa: PLC0415 - importing the package stays light

    from moondream_async._images import encode_image  # noqa: PLC0415

    check_positive("timeout", timeout, "a number of seconds over 0")
    check_count("max_bytes", max_bytes)
    if max_pixels is not None:
        check_count("max_pixels", max_pixels)
    check_ssl_context(ssl_context)
    networks = networks_of(allow)
    if not isinstance(url, str):
        raise ImageError(f"url must be an address, not {url!r:.100}")
    reason = _objection(url)
    if reason is not None:
        url = shown(url)  # variables must show no password, either
        raise ImageError(f"{url} {reason}")
    with move_on_after(timeout):
        data = await fetch_bytes(
            url, max_bytes=max_bytes, networks=networks, ssl_context=ssl_context
        )
        encode = partial(encode_image, data, max_pixels=max_pixels)
        try:
            return await to_thread.run_sync(encode, abandon_on_cancel=True)
        except ImageError as error:
            raise ImageError(f"{shown(url)}: {error}") from error.__cause__
    raise APITimeoutError(f"{shown(url)} was not fetched within {timeout:g} seconds", phase="total")


async def fetch_bytes(
    url: str,
    *,
    max_bytes: int,
    networks: Sequence[Network],
    ssl_context: ssl.SSLContext | None = None,
) -> bytes:
    """Return the bytes of a picture on the web; there is no time limit.

    Raises:
        ImageError: As for `fetch_image`.
        APIConnectionError: The connection could not be made, or was lost.
    """
    from .fetching import fetch  # noqa: PLC0415 - loads aiohttp

    reason = _objection(url)
    if reason is not None:
        url = shown(url)  # variables must show no password, either
        raise ImageError(f"{url} {reason}")
    allows = partial(is_public, networks=networks)
    for _ in range(_MAX_REDIRECTS + 1):
        async with fetch(url, allows=allows, ssl_context=ssl_context) as response:
            if response.status in _REDIRECTS and "Location" in response.headers:
                url = _redirected(url, response.headers["Location"])
                continue
            if not 200 <= response.status < 300:
                raise ImageError(f"{shown(url)} gives no picture, but status {response.status}")
            kind = response.content_type
            if not kind.startswith("image/") and kind not in ("", "application/octet-stream"):
                raise ImageError(f"{shown(url)} gives no picture, but {kind}")
            data = bytearray()
            async for part in response:
                data += part
                if len(data) > max_bytes:
                    raise ImageError(f"{shown(url)} is larger than {max_bytes} bytes")
            return bytes(data)
    raise ImageError(f"{shown(url)} redirects more than {_MAX_REDIRECTS} times")


def networks_of(allow: Sequence[str]) -> list[Network]:
    """Return networks by their names.

    Raises:
        RequestError: A name is not that of a network.
    """
    try:
        return [ip_network(each) for each in ([allow] if isinstance(allow, str) else allow)]
    except (TypeError, ValueError) as error:
        raise RequestError(f"allow must name networks, as '10.1.0.0/16': {error}") from error


def _redirected(url: str, location: str) -> str:
    try:
        target = urljoin(url, location)
        reason = _objection(target)
    except ValueError:
        reason = "is no valid address"
    if reason is not None:
        raise ImageError(f"{shown(url)} redirects to {shown(location)}, which {reason}")
    return target


def _objection(url: str) -> str | None:
    """Return what is wrong with an address as it is written; None if it is valid."""
    from yarl import URL  # noqa: PLC0415 - aiohttp's, loaded when it is

    try:
        target = URL(url)
        host, port = target.host, target.explicit_port
    except (TypeError, ValueError):
        return "is no valid address"
    if target.scheme not in ("http", "https") or not host:
        return "is no http or https address"
    if target.user is not None or target.password is not None:
        return "has a user in it, which is not sent"
    return "has no valid port" if port == 0 else None
