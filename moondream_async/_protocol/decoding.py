"""JSON as servers send it, decoded within limits: a value that is safe to use, or an error.

Whatever decodes here can be shown, encoded and walked through again: it is not nested deeper
than `MAX_DEPTH`, what it has beside its text is little enough to be decoded while an event loop
waits (well under 50 ms), and half of a surrogate pair, which UTF-8 can't say, is U+FFFD.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_DEPTH = 64
"""Arrays and objects in one another. Answers have six at most."""

MAX_DATA_BYTES = 1024 * 1024
"""What is no text, in a large object."""

MAX_STRINGS = 100_000
"""Keys and texts in a large object: a box has four."""

MAX_CONTAINERS = 50_000
"""Arrays and objects beside the text of a large object: a box is one, an answer has 150."""

_SMALL = 64 * 1024  # too few bytes to pass one of these limits, or to take long
_ESCAPE = re.compile(
    rb"""
    \\ (?: u [dD][89abAB][0-9a-fA-F]{2} \\u [dD][c-fC-F][0-9a-fA-F]{2}  # a pair
       | (u [dD][89a-fA-F][0-9a-fA-F]{2})  # half of one
       | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_decode_shallow = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
FAULTS = (msgspec.DecodeError, UnicodeError, RecursionError)


def decode(data: bytes) -> Any:
    r"""Decode JSON.

    Raises:
        ValueError: It is none, or passes a limit.

    >>> decode(b'{"chunk": "a \\ud83d"}')
    {'chunk': 'a �'}
    """
    try:
        if len(data) > _SMALL:
            _check_size(data)
        value = msgspec.json.decode(data)
    except FAULTS as error:
        mended = _ESCAPE.sub(_mend, data) if b"\\u" in data else data
        if mended == data:
            raise ValueError(str(error)) from None
        return decode(mended)
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:  # or else it can't be nested so deeply
        _check_depth(value)
    return value


def _mend(escape: re.Match[bytes]) -> bytes:
    return b"\\ufffd" if escape[1] else escape[0]


def _check_size(data: bytes) -> None:
    """Raise if a large object is made of too much that is no text, before it is decoded.

    Millions of small values would hold up the event loop for seconds. What is no object is
    data, all of it.
    """
    if data.count(b'"') - data.count(b'\\"') > 2 * MAX_STRINGS:
        raise ValueError(f"it has more than {MAX_STRINGS} strings")
    is_object = data.lstrip()[:1] == b"{"
    values = map(bytes, _decode_shallow(data).values()) if is_object else (data,)
    beside = [each for each in values if each[:1] != b'"']
    if sum(map(len, beside)) > MAX_DATA_BYTES:
        raise ValueError(f"its data is over the limit of {MAX_DATA_BYTES} bytes")
    if sum(each.count(b"[") + each.count(b"{") for each in beside) > MAX_CONTAINERS:
        raise ValueError(f"it has more than {MAX_CONTAINERS} arrays and objects")


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
