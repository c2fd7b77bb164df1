"""The server that a client sends to, and the check that its key goes to no other."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from yarl import URL

from moondream_async._protocol.secret import Secret, hidden, is_header_value
from moondream_async.errors import APIConnectionError, RequestError

from .addresses import is_near, is_near_host, parse, shown
from .proxies import NO_PROXIES, Proxies, proxies_at, proxies_of_environment
from .sockets import Guard

_CLOUD_HOST = "api.moondream.ai"
_CLOUD = f"https://{_CLOUD_HOST}/v1"


class Target(NamedTuple):
    """The server that a client sends to."""

    endpoint: str
    """The address without a slash at its end."""
    key: Secret | None
    proxies: Proxies
    guard: Callable[[URL], Guard | None] | None


def read_target(
    key: Secret | None,
    endpoint: Secret | None,
    proxy: Secret | Literal[False] | None,
    *,
    insecure_hosts: Collection[str],
    own_session: bool,
) -> Target:
    """Return the server that the arguments and the environment name.

    No variable in this function holds a secret as text, since a traceback may show variables.

    Raises:
        RequestError: An argument is wrong, or the cloud is used without a key.
    """
    if key is None:
        key = hidden(os.environ.get("MOONDREAM_API_KEY"))
    if key is not None and not (key and is_header_value(key)):
        # The message does not show it: it may be the right key with a line break, or in bytes.
        raise RequestError("api_key must be a string of printable ASCII characters")
    if endpoint is None:
        endpoint = hidden(os.environ.get("MOONDREAM_ENDPOINT")) or Secret(_CLOUD)
    address = _read_endpoint(endpoint)
    if isinstance(address, str):
        raise RequestError(address)
    if key is None and address.host == _CLOUD_HOST:
        raise RequestError(
            "Moondream Cloud needs an API key. Pass api_key= or set MOONDREAM_API_KEY; or "
            "name a local server, as endpoint='http://127.0.0.1:2020/v1' or in "
            "MOONDREAM_ENDPOINT; or try `moondream-async demo`, which needs neither."
        )
    if proxy is None:
        proxies = proxies_of_environment(os.environ) if own_session else NO_PROXIES
    else:
        proxies = NO_PROXIES if proxy is False else proxies_at(proxy)
    proxies.for_url(address)
    return Target(
        (endpoint.reveal() if endpoint.reveal().isascii() else str(address)).rstrip("/"),
        key,
        proxies,
        None if key is None else _key_guard(address, insecure_hosts),
    )


def _read_endpoint(address: Secret) -> URL | str:
    """Return the address of a server, or a message that says what is wrong with it.

    The function raises nothing, since its variables may hold a password.
    """
    text = address.reveal()
    problem = "endpoint must be an http or https address, "
    problem += f"not {shown(text)!r}" if text else "as a string"  # no text: another type
    try:
        url = URL(text)
        host, port = url.host, url.port
    except (TypeError, ValueError):  # brackets that don't close, a port that is no number, ...
        return problem
    if url.scheme not in ("http", "https") or port == 0 or not url.path.isascii():
        return problem
    if not host or (
        ":" not in host and not all(1 <= len(x) <= 63 for x in host.removesuffix(".").split("."))
    ):
        return problem  # a name in DNS has labels of 1 to 63 letters, and may end in a dot
    if url.user is not None or url.password is not None or "?" in text or "#" in text:
        return "endpoint must be an address without a user, a query or a fragment"
    return url if text.isprintable() and " " not in text else problem


def _key_guard(
    endpoint: URL, insecure_hosts: Collection[str]
) -> Callable[[URL], Guard | None] | None:
    """Check that others can't read a key on its way; return a guard for its connections.

    The guard is needed if the key goes over plain http to a host whose name is near: the name
    may resolve to an address that is not. Requests to other origins carry no key and need none.

    Raises:
        RequestError: The host of the endpoint is not near, or `insecure_hosts` are no names
            of hosts.
    """
    names = [insecure_hosts] if isinstance(insecure_hosts, str) else insecure_hosts
    try:
        insecure = {_canonical(each) for each in names}
    except (TypeError, ValueError, AttributeError):
        raise RequestError(
            f"insecure_hosts must be names of hosts, not {insecure_hosts!r}"
        ) from None
    host = endpoint.host or ""
    if endpoint.scheme == "https" or _canonical(host) in insecure:
        return None
    advice = (
        "over plain http, where anybody on the way can read it. Use https, or pass "
        f"insecure_hosts=[{host!r}] if you know that way."
    )
    if not is_near_host(host):
        raise RequestError(f"The API key would go to {host} {advice}")
    origin = endpoint.origin()

    def refusal(_url: URL, address: str) -> APIConnectionError:
        message = f"The way to {origin} leads to {address}, and the API key would go there {advice}"
        return APIConnectionError(message, permanent=True)

    return lambda url: Guard(is_near, refusal) if url.origin() == origin else None


def _canonical(host: str) -> str:
    address = parse(host.strip("[]"))
    if address is not None:
        return str(address)
    name = URL.build(scheme="http", host=host).host
    return (name or host).rstrip(".").lower()
