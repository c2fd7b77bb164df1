# ruff: noqa: PTH112, PTH116, PTH119, PTH122, PTH123, PTH207 - strings cost less for each of a million files
"""Where pictures on the disk come from: folders, patterns and lists. It all blocks.

Nothing is gathered: what is found is yielded at once, in the order in which the
disk has it, so that a million files cost no more memory than one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec

from moondream_async._images.inputs import MAX_FILE_BYTES

from .names import name_of, simplest

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
        data, status = _read(self.name)
        digest = hashlib.sha256(data).hexdigest()
        self.contents = Contents(len(data), status.st_mtime_ns, digest)
        return data


def read_same(path: str, contents: Contents) -> bytes | None:
    """Return a file's bytes if it is what it was, else None."""
    try:
        data, _ = _read(path)
    except (OSError, ValueError):
        return None
    return data if hashlib.sha256(data).hexdigest() == contents.sha256 else None


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


class Search:
    """Finds the files that arguments mean: folders with all below them, patterns, and files.

    Hidden files and folders are left out, and links to folders are not followed. A file
    that doesn't exist is found, for it to be told.

    Args:
        complain: Called with what can't be searched, as a folder that can't be read, or
            gives nothing. The search goes on.
    """

    def __init__(self, complain: Callable[[str], object] | None = None) -> None:
        self.left_out: Counter[str] = Counter()
        """How many files were passed over in folders, by the end of their names."""
        self._complain = complain or (lambda _: None)

    def find(self, arguments: Iterable[str]) -> Iterator[Found]:
        """Yield the files that arguments mean."""
        for argument in arguments:
            if os.path.isdir(argument):
                yield from self._or_complain(
                    self._walk(argument), "there is no picture in", argument
                )
            elif glob.has_magic(argument) and not os.path.lexists(argument):
                yield from self._or_complain(_matches(argument), "no file matches", argument)
            else:
                yield Found(simplest(argument), os.path.basename(argument))

    def _or_complain(self, found: Iterator[Found], what: str, argument: str) -> Iterator[Found]:
        first = next(found, None)
        if first is None:
            self._complain(f"{what} {name_of(argument)}")
            return
        yield first
        yield from found

    def _walk(self, root: str) -> Iterator[Found]:
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if _is_folder(entry):
                            folders.append(entry.path)
                        elif entry.name.lower().endswith(SUFFIXES):
                            below = os.path.relpath(entry.path, root)
                            yield Found(simplest(entry.path), below)
                        else:
                            self.left_out[os.path.splitext(entry.name)[1].lower()] += 1
            except OSError as error:
                if folder == root or not isinstance(error, FileNotFoundError):  # removed meanwhile
                    self._complain(f"can't list {name_of(folder)}: {error.strerror or error}")


def _matches(pattern: str) -> Iterator[Found]:
    for path in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(path):
            yield Found(simplest(path), os.path.basename(path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # then reading it tells why not


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
