# ruff: noqa: PTH116, PTH123 - strings cost less for each of a million files
"""A picture that was found: its names, its bytes, and how a later run recognises it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import msgspec

from moondream_async._images.inputs import MAX_FILE_BYTES
from moondream_async.errors import MissingExtraError

from .names import name_of, path_of
from .remote import is_remote, read_remote


class Found(msgspec.Struct, frozen=True):
    """A file to ask about."""

    path: str
    below: str
    """The path within the folder that was searched; a text about the picture is named after it."""

    row: dict[str, Any] | None = None
    """The other columns of its row, where a table names the picture."""

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


class PictureFile:
    """A picture as a file that the client reads; reading it sets `contents`."""

    def __init__(self, found: Found) -> None:
        self.found = found
        self.name = found.path
        self.contents: Contents | None = None
        """None until the picture was read."""

    def read(self, _size: int = -1) -> bytes:
        """Return all of the file at the first call, and nothing at the next."""
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


def picture_of(record: Mapping[str, Any]) -> bytes | None:
    """Return the picture that a line is about; None where it is gone or has changed."""
    file = record.get("file")
    if file is None:
        return None
    try:
        data, _ = _read(path_of(record["path"]))
    except (OSError, ValueError):
        return None
    return data if hashlib.sha256(data).hexdigest() == file["sha256"] else None


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
        return hashlib.sha256(_read(found.path)[0]).hexdigest() == contents.sha256
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


def _read(path: str) -> tuple[bytes, os.stat_result | None]:
    if is_remote(path):
        return read_remote(path), None
    # O_NONBLOCK: to open a pipe without a writer would block for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise OSError(error.strerror) from error  # callers name the path
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise OSError(f"its {status.st_size:,} bytes are too many")
        return file.read(status.st_size), status
