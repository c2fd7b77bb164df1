"""The proxy of a request: the one that the caller named, one of the environment, or none.

The environment is read as in other HTTP libraries: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and
NO_PROXY, also in small letters. The environment's proxies are not used for addresses of this
machine. A proxy's password is kept secret like the API key.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import NamedTuple
from urllib.parse import unquote

from yarl import URL

from moondream_async._protocol.secret import Secret
from moondream_async.errors import RequestError

from .addresses import is_loopback, parse, shown

_WANTED = "an address as 'http://proxy:3128', with 'user:password@' before the name if need be"


class Proxy(NamedTuple):
    """A proxy, and the credentials that are sent to it."""

    url: URL
    """The address without user and password."""
    authorization: Secret | None = None
    """The value of Proxy-Authorization."""
    secrets: tuple[Secret, ...] = ()
    """The password in all forms in which an error may quote it."""


class Proxies:
    """Finds the proxy for an address.

    Args:
        by_scheme: A proxy for each scheme, or for ``all``; in place of an invalid proxy, a
            message that says what is wrong with it.
        direct: The hosts to reach without a proxy, as NO_PROXY lists them.
    """

    def __init__(self, by_scheme: Mapping[str, Proxy | str], direct: Iterable[str] = ()) -> None:
        self._by_scheme = by_scheme
        self._direct = [each.strip().lower() for each in direct if each.strip()]

    def for_url(self, url: URL) -> Proxy | None:
        """Return the proxy for an address; None to use no proxy.

        Raises:
            RequestError: The proxy is invalid.
        """
        if not self._by_scheme:
            return None
        proxy = self._by_scheme.get(url.scheme) or self._by_scheme.get("all")
        if proxy is None or self._is_direct(url):
            return None
        if isinstance(proxy, str):
            raise RequestError(proxy)
        return proxy

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """The passwords of all proxies."""
        proxies = [each for each in self._by_scheme.values() if isinstance(each, Proxy)]
        return tuple(secret for each in proxies for secret in each.secrets)

    def _is_direct(self, url: URL) -> bool:
        host = (url.host or "").rstrip(".")
        return is_loopback(host) or any(_covers(each, host, url.port) for each in self._direct)


NO_PROXIES = Proxies({})


class _Only(Proxies):
    """The proxy that the caller named: used for all addresses, also those of this machine."""

    def _is_direct(self, url: URL) -> bool:  # noqa: ARG002
        return False


def proxies_at(address: Secret) -> Proxies:
    """Return proxies that use one proxy for all addresses."""
    proxy = _read(address)
    if isinstance(proxy, str):
        proxy = f"proxy must be {_WANTED}, or False" + (f", not {proxy}" if address else "")
    return _Only({"all": proxy})


def proxies_of_environment(environment: Mapping[str, str]) -> Proxies:
    """Return the proxies that the environment names."""
    found: dict[str, Proxy | str] = {}
    for scheme in ("http", "https", "all"):
        name = f"{scheme}_proxy"
        # As in urllib: in a CGI script, a client can set HTTP_PROXY by a header ("httpoxy").
        upper = "" if scheme == "http" and "REQUEST_METHOD" in environment else name.upper()
        used = next((each for each in (name, upper) if environment.get(each)), None)
        if used is None:
            continue
        proxy = _read(Secret(environment[used].strip()), scheme="http://")
        if isinstance(proxy, str):
            proxy = (
                f"{used} in the environment must be {_WANTED}, not {proxy}. Pass proxy=False "
                "to use none."
            )
        found[scheme] = proxy
    direct = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return Proxies(found, direct.split(",")) if found else NO_PROXIES


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Tell whether an entry of NO_PROXY covers a host: a name and its subdomains, or a network.

    >>> _covers("example.com", "www.example.com", 443), _covers("10.0.0.0/8", "10.1.2.3", 80)
    (True, True)
    >>> _covers("example.com:8080", "example.com", 443), _covers("ample.com", "example.com", 443)
    (False, False)
    """
    if entry == "*":
        return True
    with_port = re.fullmatch(r"(\[.*\]|[^:]+):([0-9]+)", entry)
    if with_port is not None:
        if int(with_port[2]) != port:
            return False
        entry = with_port[1]
    address = parse(host)
    if address is not None:
        try:
            return address in ip_network(entry.strip("[]"), strict=False)
        except ValueError:
            return False
    name = entry.lstrip("*").lstrip(".")
    return bool(name) and f".{host}".endswith(f".{name}")


def _read(address: Secret, scheme: str = "") -> Proxy | str:
    """Return the proxy at an address, or for an invalid address the text to show of it.

    The function raises nothing, since its variables hold the password.
    """
    text = address.reveal()
    if "://" not in text:
        text = scheme + text
    seen = repr(shown(text))
    try:
        url = URL(text)
        bare = URL.build(scheme=url.scheme, host=url.host or "", port=url.port)
    except (TypeError, ValueError):
        return seen
    if url.scheme not in ("http", "https") or not url.host or url.port == 0:
        return seen
    if not text.isprintable() or " " in text:
        return seen
    if url.user is None and url.password is None:
        return Proxy(bare)
    user, password = url.user or "", url.password or ""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    raw = url.raw_password or ""
    forms = (token, f"Basic {token}", f"{user}:{password}", password, raw, unquote(raw))
    return Proxy(bare, Secret(f"Basic {token}"), tuple({Secret(form) for form in forms if form}))
