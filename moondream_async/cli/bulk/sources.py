# ruff: noqa: PTH116, PTH123 - strings cost less for each of a million files
"""A picture on the disk: its names, its contents, and by what it is known to be the same."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import Any

import msgspec

from moondream_async._images.inputs import MAX_FILE_BYTES

from .names import name_of
from .remote import is_remote, read_remote


class Found(msgspec.Struct, frozen=True):
    """A file to ask about."""

    path: str
    below: str
    """The same, from the folder on that was searched: what a file beside it is named after."""

    row: dict[str, Any] | None = None
    """What else a table has in its row."""

    time: float | None = None
    """Of a video's frame: its seconds, by the file's own timestamps."""

    data: bytes | None = None
    """The picture, where it was read when it was found: a video's frame, a shard's sample."""

    contents: Contents | None = None
    """With `data`: the sample's own, or those of the whole video."""

    @property
    def name(self) -> str:
        """The path as JSON can say it."""
        return name_of(self.path)


class Contents(msgspec.Struct, frozen=True):
    """By what a file is known to be the same as before."""

    size: int
    mtime_ns: int
    sha256: str


class PictureFile:
    """A picture's file, which the client reads when its turn comes; it then knows its contents."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.name = found.path
        self.contents: Contents | None = None
        """None until it was read."""

    def read(self, _size: int = -1) -> bytes:
        """Return all of the file, and nothing after that.

        Raises:
            OSError: It can't be read.
        """
        if self.contents is not None:
            return b""
        if self.found.data is not None:
            self.contents = self.found.contents
            return self.found.data
        data, status = _read(self.name)
        digest = hashlib.sha256(data).hexdigest()
        mtime = 0 if status is None else status.st_mtime_ns
        self.contents = Contents(len(data), mtime, digest)
        return data


def read_same(path: str, contents: Contents) -> bytes | None:
    """Return a file's bytes if it is what it was, else None."""
    try:
        data, _ = _read(path)
    except (OSError, ValueError):
        return None
    return data if hashlib.sha256(data).hexdigest() == contents.sha256 else None


def is_same(found: Found, contents: Contents) -> bool:
    """Tell whether a file is what it was. It is read only where its time has changed.

    What is elsewhere is taken for the same: to ask would cost a request each.
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
        return hashlib.sha256(_read(found.path)[0]).hexdigest() == contents.sha256
    except OSError:
        return True  # it is gone: what is known of it stays


def _read(path: str) -> tuple[bytes, os.stat_result | None]:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    if is_remote(path):
        return read_remote(path), None
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise OSError(error.strerror) from error  # the path is named by who tells of it
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"its {status.st_size:,} bytes are too many")
        return file.read(status.st_size), status
