"""The headers that callers add to requests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moondream_async.errors import RequestError

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110: token
_OURS = frozenset(
    {
        *("accept", "accept-encoding", "x-moondream-auth", "host", "connection"),
        *("content-type", "content-length", "content-encoding", "transfer-encoding", "expect"),
    }
)


def check_headers(headers: Any) -> dict[str, str]:
    """Check the headers that a caller adds to the client's own; return them.

    Raises:
        RequestError: A header can't be sent, or is one that the client sets itself.

    >>> check_headers({"X-Team": "birds"})
    {'X-Team': 'birds'}
    """
    if headers is None:
        return {}
    if not isinstance(headers, Mapping):
        raise RequestError(f"headers must be a mapping of names to values, not {type(headers)}")
    for name, value in headers.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"headers: {name!r} is no name of a header")
        if name.lower() in _OURS:
            raise RequestError(f"headers: {name} is written by the client itself")
        # The value is not shown: it may be a password.
        if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            raise RequestError(f"headers: the value of {name} must be printable ASCII, in a line")
    return dict(headers)


def joined(headers: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Return both; `more` replaces headers of the same name, whatever its case."""
    names = {name.lower() for name in more}
    return {**{k: v for k, v in headers.items() if k.lower() not in names}, **more}
