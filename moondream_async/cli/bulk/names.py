# ruff: noqa: PTH114, PTH118, PTH206 - paths are strings here, as they stand in lines
"""Paths as JSON can hold them, and back."""

from __future__ import annotations

import os
import re

_ESCAPED = re.compile(rb"\\\\|\\x([0-9a-f]{2})")
_LOOKS_ESCAPED = re.compile(rb"\\x[0-9a-f]{2}")


def name_of(path: str) -> str:
    r"""Return a path as JSON can hold it; no two paths share a name.

    Bytes that are not UTF-8 are escaped, and in such a path backslashes, too; likewise in a
    path that looks as if it had such escapes.

    >>> name_of("cats/1.jpg"), name_of(r"a\b.jpg")
    ('cats/1.jpg', 'a\\b.jpg')
    >>> name_of("a\udcff.jpg"), name_of(r"a\xff.jpg")
    ('a\\xff.jpg', 'a\\\\xff.jpg')
    """
    data = os.fsencode(path)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        pass
    else:
        if os.sep == "\\" or not _LOOKS_ESCAPED.search(data):
            return text
    return data.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def path_of(name: str) -> str:
    r"""Return the path that `name_of` gave this name.

    >>> path_of("a\\xff.jpg") == "a\udcff.jpg", path_of("a\\\\xff.jpg") == r"a\xff.jpg"
    (True, True)
    """
    data = name.encode("utf-8", "surrogatepass")
    if os.sep == "\\" or not _LOOKS_ESCAPED.search(data):
        return name
    return os.fsdecode(
        _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]) if found[1] else b"\\", data)
    )


def simplest(path: str) -> str:
    """Return the same path without its needless parts: ``.``, ``//``, and ``a/..``.

    A ``..`` after a link stays: it leads to the parent of the link's target.
    """
    if ".." not in path.split("/"):
        return os.path.normpath(path)
    parts: list[str] = []
    for part in path.split(os.sep):
        if part in ("", ".") and parts:
            continue
        leads_back = part == ".." and bool(parts) and parts[-1] not in ("", ".", "..")
        if leads_back and not os.path.islink(os.sep.join(parts)):
            parts.pop()
        else:
            parts.append(part)
    while len(parts) > 1 and parts[0] == ".":
        del parts[0]
    return os.sep.join(parts) or "."
