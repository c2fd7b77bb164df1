"""Which proxy a request goes through: one that was named, one of the environment, or none.

The environment is read as every HTTP library reads it: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY
and NO_PROXY, in small letters, too. Addresses of this machine are always reached
directly. A proxy's password is kept like the API key: it is in nothing that is shown.
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
    """Without a user."""
    authorization: Secret | None = None
    """The value of Proxy-Authorization."""
    secrets: tuple[Secret, ...] = ()
    """What is not to be shown, in all forms that it may come back in."""


class Proxies:
    """Tells the proxy for each address.

    Args:
        by_scheme: By the scheme of what is asked for, or ``all``; a string says what is
            wrong with the one that was named.
        direct: What is reached without, as NO_PROXY lists it.
    """

    def __init__(self, by_scheme: Mapping[str, Proxy | str], direct: Iterable[str] = ()) -> None:
        self._by_scheme = by_scheme
        self._direct = [each.strip().lower() for each in direct if each.strip()]

    def for_url(self, url: URL) -> Proxy | None:
        """Return the proxy for an address; None where there is none.

        Raises:
            RequestError: The one that was named can't be used.
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
        """The passwords of all of them."""
        proxies = [each for each in self._by_scheme.values() if isinstance(each, Proxy)]
        return tuple(secret for each in proxies for secret in each.secrets)

    def _is_direct(self, url: URL) -> bool:
        host = (url.host or "").rstrip(".")
        return is_loopback(host) or any(_covers(each, host, url.port) for each in self._direct)


NO_PROXIES = Proxies({})


class _Only(Proxies):
    """One proxy for everything, this machine included: the caller named it."""

    def _is_direct(self, url: URL) -> bool:  # noqa: ARG002
        return False


def proxies_at(address: Secret) -> Proxies:
    """Return what sends everything through the proxy at an address."""
    proxy = _read(address)
    if isinstance(proxy, str):
        proxy = f"proxy must be {_WANTED}, or False, not {proxy}"
    return _Only({"all": proxy})


def proxies_of_environment(environment: Mapping[str, str]) -> Proxies:
    """Return what the environment says."""
    found: dict[str, Proxy | str] = {}
    for scheme in ("http", "https", "all"):
        name = f"{scheme}_proxy"
        # As urllib: in a CGI script, HTTP_PROXY is a header of the request's ("httpoxy").
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
    """Tell whether an entry of NO_PROXY means a host: a name with all below it, or a network.

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
    """Return the proxy at an address, or what to show of an address that can't be right.

    It raises nothing: in its variables is the password.
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
