"""JSON as servers send it, decoded within limits: a value that is safe to use, or an error.

Whatever decodes here can be shown, encoded and walked through again: it is not nested deeper
than `MAX_DEPTH`, beside its text it is small enough to be decoded while an event loop waits,
and half of a surrogate pair, which UTF-8 can't say, is U+FFFD.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_DEPTH = 64
"""Arrays and objects in one another. Answers have six at most."""

MAX_DATA_BYTES = 1024 * 1024
"""What is no text: millions of small values would hold up the event loop for seconds."""

_ESCAPE = re.compile(
    rb"""
    \\ (?: u [dD][89abAB][0-9a-fA-F]{2} \\u [dD][c-fC-F][0-9a-fA-F]{2}  # a pair
       | (u [dD][89a-fA-F][0-9a-fA-F]{2})  # half of one
       | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_decode_shallow = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_FAULTS = (msgspec.DecodeError, UnicodeError, RecursionError)


def decode(data: bytes) -> Any:
    r"""Decode JSON.

    Raises:
        ValueError: It is none, or passes a limit.

    >>> decode(b'{"chunk": "a \\ud83d"}')
    {'chunk': 'a �'}
    """
    if len(data) > MAX_DATA_BYTES:
        _check_size(data)
    try:
        value = _decode(data)
    except _FAULTS as error:
        raise ValueError(str(error)) from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:  # or else it can't be nested so deeply
        _check_depth(value)
    return value


def _decode(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError):
        mended = _ESCAPE.sub(_mend, data) if b"\\u" in data else data
        if mended == data:
            raise
    return msgspec.json.decode(mended)


def _mend(escape: re.Match[bytes]) -> bytes:
    return b"\\ufffd" if escape[1] else escape[0]


def _check_size(data: bytes) -> None:
    """Raise if too much of a large object is no text. What is no object is refused elsewhere."""
    try:
        values = _decode_shallow(data)
    except _FAULTS as error:
        raise ValueError(str(error)) from None
    beside = sum(len(raw) for value in values.values() if (raw := bytes(value))[:1] != b'"')
    if beside > MAX_DATA_BYTES:
        raise ValueError(f"its data is over the limit of {MAX_DATA_BYTES} bytes")


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
