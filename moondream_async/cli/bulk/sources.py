# ruff: noqa: PTH114, PTH116, PTH118, PTH123, PTH206 - strings cost less for a million files
"""A picture that was found: its name in a line, its bytes, and how a later run recognises it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Self

import msgspec

from moondream_async._images.inputs import MAX_FILE_BYTES
from moondream_async.errors import MissingExtraError

from .remote import is_remote, read_remote

_ESCAPED = re.compile(rb"\\\\|\\x([0-9a-f]{2})")
_LOOKS_ESCAPED = re.compile(rb"\\x[0-9a-f]{2}")


class Found(msgspec.Struct, frozen=True):
    """A file to ask about."""

    path: str
    below: str
    """The path within the folder that was searched; a text about the picture is named after it."""

    row: dict[str, Any] | None = None
    """The other columns of its row, where a table names the picture."""

    place: str = ""
    """The table and the number of its row, where a table names the picture."""

    time: float | None = None
    """The timestamp of a video's frame, in seconds."""

    data: bytes | None = None
    """The bytes of a video's frame or a shard's sample, which are read when they are found."""

    contents: Contents | None = None
    """With `data`: the state of the sample, or of the whole video."""

    fault: str | None = None
    """Why there is no picture, where a table's row names none."""

    @property
    def name(self) -> str:
        """The path as JSON can say it."""
        return name_of(self.path)


class Contents(msgspec.Struct, frozen=True):
    """The state of a file, by which a later run sees whether it has changed."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, data: bytes, mtime_ns: int = 0) -> Self:
        """Return the state of a file with these bytes; a sample of a shard has no time."""
        return cls(len(data), mtime_ns, hashlib.sha256(data).hexdigest())


def picture_of(record: Mapping[str, Any]) -> bytes | None:
    """Return the picture that a line is about; None where it is gone or has changed."""
    file = record.get("file")
    if file is None:
        return None
    try:
        data, contents = read(path_of(record["path"]))
    except (OSError, ValueError):
        return None
    return data if contents.sha256 == file["sha256"] else None


def is_same(found: Found, contents: Contents) -> bool:
    """Tell whether a file is unchanged. It is read only where its time has changed.

    A file on another machine counts as unchanged: a look at it would cost a request.
    """
    if found.contents is not None:
        return found.contents.sha256 == contents.sha256
    if is_remote(found.path):
        return True
    try:
        status = os.stat(found.path)
        if status.st_size != contents.size:
            return False
        if status.st_mtime_ns == contents.mtime_ns:
            return True
        return read(found.path)[1].sha256 == contents.sha256
    except OSError:
        return True  # the file is gone, and its line stays


def needs(module: str, what: str, extra: str) -> Any:
    """Return a module; refuse where it is not installed, before anything is paid for.

    Raises:
        MissingExtraError: It says which extra to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{what}: pip install 'moondream-async[{extra}]' ({error})"
        ) from None


def read(path: str) -> tuple[bytes, Contents]:
    """Return a file's bytes, and its state; OSError does not name the path."""
    if is_remote(path):
        return (data := read_remote(path)), Contents.of(data)
    # O_NONBLOCK: to open a pipe without a writer would block for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise OSError(error.strerror) from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"its {status.st_size:,} bytes are too many")
        data = file.read(status.st_size)
    return data, Contents.of(data, status.st_mtime_ns)


# -- paths as JSON can hold them ---------------------------------------------------------------


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
