# ruff: noqa: PTH112, PTH116, PTH119, PTH123, PTH207 - strings cost less for each of a million files
"""Where pictures on the disk come from: folders, patterns and lists. It all blocks.

Nothing is gathered: what is found is yielded at once, in the order in which the
disk has it, so that a million files cost no more memory than one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator

import msgspec

from moondream_async._images.inputs import MAX_FILE_BYTES

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe"),
    *(".jpeg", ".jpg", ".pcx", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
"""What is taken for a picture in a folder; a file that is named itself may be called anything."""


class Found(msgspec.Struct, frozen=True):
    """A file to ask about."""

    path: str
    below: str
    """The same, from the folder on that was searched: what a file beside it is named after."""

    @property
    def name(self) -> str:
        """The path as JSON can say it; a name that is no UTF-8 has its odd bytes escaped."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")


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
        data, status = _read(self.name)
        digest = hashlib.sha256(data).hexdigest()
        self.contents = Contents(len(data), status.st_mtime_ns, digest)
        return data


def is_same(path: str, contents: Contents) -> bool:
    """Tell whether a file is what it was. It is read only where its time has changed."""
    try:
        status = os.stat(path)
        if status.st_size != contents.size:
            return False
        if status.st_mtime_ns == contents.mtime_ns:
            return True
        return hashlib.sha256(_read(path)[0]).hexdigest() == contents.sha256
    except OSError:
        return True  # it is gone: what is known of it stays


def find(arguments: Iterable[str]) -> Iterator[Found]:
    """Yield the files that arguments mean: folders with all below them, patterns, and files.

    Hidden files and folders are left out, and links to folders are not followed. A file
    that doesn't exist is yielded, for it to be told.
    """
    for argument in arguments:
        if os.path.isdir(argument):
            yield from _walk(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            for path in glob.iglob(argument, recursive=True):
                if os.path.isdir(path):
                    continue
                yield Found(os.path.normpath(path), os.path.basename(path))
        else:
            yield Found(os.path.normpath(argument), os.path.basename(argument))


def lines(pieces: Iterable[bytes]) -> Iterator[str]:
    r"""Yield the paths of a list, one a line; blank lines are none.

    >>> list(lines([b"a.jpg\nb", b".jpg\r\n\n", b"c.jpg"]))
    ['a.jpg', 'b.jpg', 'c.jpg']
    """
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            if path := line.rstrip(b"\r"):
                yield os.fsdecode(path)
    if rest:
        yield os.fsdecode(rest)


def _walk(root: str) -> Iterator[Found]:
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            if folder == root:
                raise
            if isinstance(error, FileNotFoundError):  # removed meanwhile
                continue
            # Told in the place of its pictures, rather than passed over.
            yield Found(os.path.normpath(folder), os.path.relpath(folder, root))
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES):
                    yield Found(os.path.normpath(entry.path), os.path.relpath(entry.path, root))


def _read(path: str) -> tuple[bytes, os.stat_result]:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
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
