"""Which IP addresses are public, and which belong to the local network or to this machine.

`fetch_image` connects to public addresses only, and the API key is sent over plain http to near
addresses only. Both check the address that a socket is about to be connected to (see `sockets`),
since a host may be written in many ways, and a name may resolve to any address. The networks are
listed here, since `ipaddress` calls different networks global and private in different versions
of Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# The registries of special addresses, iana.org/assignments/iana-ipv4-special-registry and
# iana-ipv6-special-registry, and multicast. In IPv6 only 2000::/3 has been given out.
_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24"),
            *("192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
            *("224.0.0.0/4", "240.0.0.0/4"),
            *("::/3", "4000::/2", "8000::/1"),
            *("2001::/23", "2001:db8::/32", "3fff::/20"),
        ),
    )
)
_NEAR = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/32", "10.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.168.0.0/16", "::/127", "fc00::/7", "fe80::/10"),
        ),
    )
)
_LOOPBACK = tuple(map(ip_network, ("0.0.0.0/32", "127.0.0.0/8", "::/127")))

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291: an IPv4 address, as a dual socket shows it
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: how an IPv6-only network reaches IPv4
_6TO4 = IPv6Network("2002::/16")  # RFC 3056
_ISATAP = 0x5EFE  # RFC 5214: before the IPv4 address, in the lower half of any address

_LOCAL_SUFFIXES = (".localhost", ".local", ".internal")


def parse(text: str) -> Address | None:
    """Return a host's IP address without its zone; None if the host is a name.

    Spellings that only the system's resolver understands are addresses, too.

    >>> parse("127.0.0.1"), parse("fe80::1%eth0"), parse("example.com")
    (IPv4Address('127.0.0.1'), IPv6Address('fe80::1'), None)
    >>> parse("134744072"), parse("0x7f.1"), parse("127.0.0.1.")
    (IPv4Address('8.8.8.8'), IPv4Address('127.0.0.1'), IPv4Address('127.0.0.1'))
    """
    text = text.partition("%")[0].rstrip(".")
    try:
        return ip_address(text)
    except ValueError:
        pass
    if not re.fullmatch("[0-9][0-9a-fx.]*", text, re.ASCII | re.IGNORECASE):
        return None
    from socket import inet_aton  # noqa: PLC0415 - for such spellings only

    try:
        return IPv4Address(inet_aton(text))
    except OSError:
        return None


def is_public(address: Address, networks: Sequence[Network] = ()) -> bool:
    """Tell whether the whole internet can reach an address, or one of `networks` has it.

    An IPv6 address that contains an IPv4 address is as public as the IPv4 address.

    >>> is_public(ip_address("1.1.1.1")), is_public(ip_address("64:ff9b::a00:1"))
    (True, False)
    """
    if _is_in(address, networks):
        return True
    if isinstance(address, IPv6Address):
        low = int(address)
        if address in _MAPPED or address in _NAT64:
            return is_public(IPv4Address(low & 0xFFFFFFFF), networks)
        if address in _6TO4 and not is_public(IPv4Address(low >> 80 & 0xFFFFFFFF), networks):
            return False
        if low >> 32 & 0xFCFF_FFFF == _ISATAP:
            return False
    return not _is_in(address, _NOT_PUBLIC)


def is_near(address: Address) -> bool:
    """Tell whether an address belongs to the local network or to this machine.

    >>> is_near(ip_address("192.168.1.2")), is_near(ip_address("8.8.8.8"))
    (True, False)
    """
    return _is_in(_unmapped(address), _NEAR)


def is_loopback(host: str) -> bool:
    """Tell whether a host, as it is written, is this machine.

    >>> is_loopback("localhost"), is_loopback("127.0.0.5"), is_loopback("example.com")
    (True, True, False)
    """
    address = parse(host)
    if address is not None:
        return _is_in(_unmapped(address), _LOOPBACK)
    return f".{host.rstrip('.').lower()}".endswith(".localhost")


def is_near_host(host: str) -> bool:
    """Tell whether a host, as it is written, is an address or a name of the local network.

    >>> is_near_host("station"), is_near_host("nas.local"), is_near_host("134744072")
    (True, True, False)
    """
    address = parse(host)
    if address is not None:
        return is_near(address)
    name = host.rstrip(".").lower()
    return "." not in name or name.endswith(_LOCAL_SUFFIXES)


def shown(address: str) -> str:
    """Return a URL as it may be shown: without a user and a password, and not too long.

    >>> shown("https://user:word@example.com/x"), shown("user:wo/rd@[proxy"), shown("@proxy")
    ('https://***@example.com/x', '***@[proxy', '***@proxy')
    """
    match = re.match(r"(?:\s*(?:[a-z][a-z0-9+.-]*:)?[/\\]{2,})?([^/?#\\]*)", address, re.IGNORECASE)
    start, end = (0, len(address)) if match is None else match.span(1)
    cut = address.rfind("@")
    # An "@" behind the host counts only if a password with a slash may stand before it.
    if cut >= end and ":" not in address[start:cut]:
        cut = -1
    text = f"{address[:start]}***{address[cut:]}" if cut >= 0 else address
    return text if len(text) <= 200 else f"{text[:200]}..."


def _unmapped(address: Address) -> Address:
    if isinstance(address, IPv6Address) and address in _MAPPED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == each.version and address in each for each in networks)
