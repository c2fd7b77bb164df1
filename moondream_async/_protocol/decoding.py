"""JSON as servers send it, decoded within limits: a value that is safe to use, or an error.

A decoded value can be shown, encoded and walked through: it is nested at most `MAX_DEPTH` deep,
its data other than text is small enough to decode in well under 50 ms, since an event loop
waits meanwhile, and half of a surrogate pair, which UTF-8 can't encode, is U+FFFD.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

MAX_DEPTH = 64
"""Levels of arrays and objects. Answers have six at most."""

MAX_DATA_BYTES = 1024 * 1024
"""Bytes other than text in a large object."""

MAX_STRINGS = 100_000
"""Strings in a large object, keys included. A box has four."""

MAX_CONTAINERS = 50_000
"""Arrays and objects in a large object. A box is one; an answer has up to 150."""

_SMALL = 64 * 1024  # so few bytes can pass none of these limits but the depth
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

LOST = "\ufffd"
"""Stands for half of a surrogate pair, unless the other half follows."""

_TEXT_KEY = r'"(?:chunk|text|content)"\s*:\s*"'
_LOW_HALF = re.compile(_TEXT_KEY + r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_HIGH_HALF = re.compile(_TEXT_KEY + r"(?:[^\"\\]|\\.)*?\\u([dD][89abAB][0-9a-fA-F]{2})\"")


def decode(data: bytes) -> Any:
    r"""Decode JSON.

    Raises:
        ValueError: The bytes are no JSON, or pass a limit.

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
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:  # fewer can't nest so deep
        _check_depth(value)
    return value


def join_halves(half: str, chunk: str, data: str) -> tuple[str, str]:
    r"""Join a chunk with the half of a character that the chunk before ended in.

    `half` is the first half of a surrogate pair, in hexadecimal, or ""; `data` is the event's
    JSON, which still shows the halves that `chunk` has lost. Returns the text to hand out, and
    the half that it ends in.

    >>> join_halves("", "a \ufffd", r'{"chunk": "a \ud83d"}')
    ('a ', 'd83d')
    >>> join_halves("d83d", "\ufffd!", r'{"chunk": "\ude00!"}')
    ('😀!', '')
    """
    if half:
        other = _LOW_HALF.search(data) if chunk.startswith(LOST) else None
        if other is not None:
            pair = (int(each, 16).to_bytes(2, "big") for each in (half, other[1]))
            chunk = b"".join(pair).decode("utf-16-be") + chunk[1:]
        else:
            chunk = LOST + chunk
    begun = _HIGH_HALF.search(data) if chunk.endswith(LOST) else None
    return (chunk, "") if begun is None else (chunk[:-1], begun[1])


def _mend(escape: re.Match[bytes]) -> bytes:
    return b"\\ufffd" if escape[1] else escape[0]


def _check_size(data: bytes) -> None:
    """Raise if a large body holds too much data other than text, before it is decoded.

    Millions of small values would block the event loop for seconds. In a body that is no
    object, everything counts as data.
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
