# ruff: noqa: PTH112, PTH113, PTH119, PTH122, PTH123, PTH207 - strings cost less for a million files
"""Finding pictures: in folders, by patterns, in tables, videos and shards, or named in lists.

Each picture is yielded when it is found, in the order in which the disk lists it, so that a
million files cost no more memory than one. Some are asked about while others are found, so
that a list of paths may be a pipe.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import glob
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import chain, filterfalse, islice

import anyio
import anyio.to_thread

from moondream_async._images import can_prepare
from moondream_async.errors import MoondreamError, RequestError

from .containers import find_frames, find_in_table, is_table, is_video
from .remote import find_remote, is_remote
from .shards import expand, find_samples, is_shard
from .sources import Found, name_of, simplest

_CHUNK = 64  # files that one call of a thread looks up
_CHUNK_BYTES = 1 << 24  # of frames and samples, which are read when they are found
_READ_BYTES = 1 << 16
_STDIN = 0  # by its number, since sys.stdin is None where it is closed
_LONGEST = 1 << 20  # characters of a path; no system takes a hundredth of that


class Search:
    """Finds the pictures that the command's arguments and lists mean.

    Hidden files and folders are left out, and links to folders are not followed. A named
    file that doesn't exist is yielded, too: reading it fails with the reason.

    Args:
        arguments: Files, patterns, and folders with all below them; ``-`` is a list on stdin.
        lists: Files with paths in them. Each is read once, since it may be a pipe.
        complain: Called with a sentence about an argument that can't be read, or gives no
            pictures. The search goes on.
        include: Patterns; a file's name, or its path in its folder, must match one of them.
        column: A table's column of pictures, or the end of a shard's pictures' names.
        is_own: Tells whether this run writes a file; `left_out` does not count such files.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        lists: Sequence[str] = (),
        complain: Callable[[str], object] = lambda _: None,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        column: str | None = None,
        every: float | None = None,
        is_own: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.left_out: Counter[str] = Counter()
        """How many other files the folders have, by the end of their names."""
        # A table is read as a table also where it is named as a list.
        self._named = [*(each for each in arguments if each != "-"), *filter(is_table, lists)]
        self._lists = [each for each in lists if not is_table(each)]
        self._stdin = "-" in arguments
        self._complain = complain
        self._include, self._exclude = include, exclude
        self._column, self._every = column, every
        self._is_own = is_own
        self._reads = True  # what is in videos and shards

    @property
    def may_repeat(self) -> bool:
        """Whether a file may be found twice; in one folder each is found once."""
        several = self._stdin or self._lists or len(self._named) > 1
        return bool(several or any(is_table(each) or is_shard(each) for each in self._named))

    async def chunks(self) -> AsyncGenerator[list[Found], None]:
        """Yield what is found, some at a time.

        Raises:
            RequestError: A table has no such column, or is none.
            MoondreamError: A list can't be read.
        """
        async for chunk in _in_chunks(self.find(self._named)):
            yield chunk
        for name in self._lists:
            with explained("read", name):
                opened = partial(os.open, name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                file = await anyio.to_thread.run_sync(opened, abandon_on_cancel=True)
            try:
                async for chunk in self._listed(file, name):
                    yield chunk
            finally:
                os.close(file)
        if self._stdin:
            async for chunk in self._listed(_STDIN, "stdin"):
                yield chunk

    async def count(self) -> int | None:
        """Return how many pictures there are; None where that can't be known beforehand.

        What is in videos and shards is known only when all of it was read.
        """
        if self._stdin or not all(map(os.path.isfile, self._lists)):
            return None
        quiet = copy.copy(self)
        vars(quiet).update(left_out=Counter(), _complain=lambda _: None, _reads=False)
        paths = chain(self._named, *map(_paths_in, self._lists))
        total = 0
        try:
            async for chunk in _in_chunks(quiet.find(paths), 1000):
                total += len(chunk)
        except (OSError, MoondreamError):  # `chunks` raises it, too
            return None
        return total

    async def _listed(self, file: int, name: str) -> AsyncGenerator[list[Found], None]:
        paths = PathList()
        piece = b"begun"
        while piece:
            # Not in a thread, where a blocked read could not be cancelled. Regular files
            # never block, and can't be waited for.
            with contextlib.suppress(OSError, NotImplementedError):
                await anyio.wait_readable(file)
            with explained("read", name):
                piece = os.read(file, _READ_BYTES)
            async for chunk in _in_chunks(self.find(paths.feed(piece))):
                yield chunk

    def find(self, arguments: Iterable[str]) -> Iterator[Found]:
        """Yield what arguments mean, as far as `include` and `exclude` let it; this blocks."""
        for given in arguments:
            for argument in expand(given) if is_shard(given) else [given]:
                for file in self._files(argument):
                    yield from filter(self._is_wanted, self._opened(file))

    def _is_wanted(self, found: Found) -> bool:
        def matches(pattern: str) -> bool:
            return fnmatch(found.below, pattern) or fnmatch(os.path.basename(found.path), pattern)

        if found.fault is not None:  # a row without a picture is told, and not left out
            return True
        included = not self._include or any(map(matches, self._include))
        return included and not any(map(matches, self._exclude))

    def _files(self, argument: str) -> Iterator[Found]:
        below = os.path.basename(argument)
        if is_table(argument) and os.path.isfile(argument):
            found = find_in_table(argument, self._column)
            return self._or_complain(found, argument, "read", "there is no row in")
        if is_remote(argument) and (glob.has_magic(argument) or not is_shard(argument)):
            found = (Found(*each) for each in find_remote(argument, self.left_out))
            return self._or_complain(found, argument, "list")
        if os.path.isdir(argument):
            return self._or_complain(self._walk(argument), argument, "list")
        if glob.has_magic(argument) and not os.path.lexists(argument):
            matches = filterfalse(os.path.isdir, glob.iglob(argument, recursive=True))
            found = (Found(simplest(each), os.path.basename(each)) for each in matches)
            return self._or_complain(found, argument, "list", "no file matches")
        return iter([Found(argument if is_remote(argument) else simplest(argument), below)])

    def _opened(self, file: Found) -> Iterator[Found]:
        """Yield a file, or in place of a video or a shard the pictures in it."""
        path = file.path
        if file.row is not None or not (is_video(path) or is_shard(path)):
            return iter([file])
        if not self._reads:
            raise RequestError(f"{file.name}: what is in it is known when it was read")
        if is_video(path):
            return self._or_complain(find_frames(path, self._every), path, "read", None)
        samples = find_samples(path, self._column, self.left_out, self._complain)
        return self._or_complain(samples, path, "read")

    def _or_complain(
        self,
        found: Iterator[Found],
        argument: str,
        act: str,
        nothing: str | None = "there is no picture in",
    ) -> Iterator[Found]:
        """Yield the files in `found`; complain where there are none, or reading fails."""
        try:
            for each in found:
                nothing = None
                yield each
        except OSError as error:
            self._complain(f"can't {act} {name_of(argument)}: {error.strerror or error}")
        else:
            if nothing is not None:
                self._complain(f"{nothing} {name_of(argument)}")

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
                        elif can_prepare(entry.name):
                            below = os.path.relpath(entry.path, root)
                            yield Found(simplest(entry.path), below)
                        elif not self._is_own(entry.path):
                            self.left_out[os.path.splitext(entry.name)[1].lower()] += 1
            except OSError as error:
                if folder == root or not isinstance(error, FileNotFoundError):  # just removed
                    self._complain(f"can't list {name_of(folder)}: {error.strerror or error}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # then reading it as a picture fails with the reason


@contextlib.contextmanager
def explained(act: str, path: str) -> Iterator[None]:
    """Turn an OSError into a MoondreamError that names the file."""
    try:
        yield
    except BrokenPipeError:  # of stdout, whose reader has left
        raise
    except OSError as error:
        raise MoondreamError(f"Can't {act} {path}: {error.strerror or error}") from error


async def _in_chunks(
    found: Iterator[Found], size: int = _CHUNK
) -> AsyncGenerator[list[Found], None]:
    def some() -> list[Found]:
        chunk: list[Found] = []
        weight = 0
        for each in islice(found, size):
            chunk.append(each)
            weight += len(each.data or b"")
            if weight > _CHUNK_BYTES:
                break
        return chunk

    while chunk := await anyio.to_thread.run_sync(some, abandon_on_cancel=True):
        yield chunk


def _paths_in(name: str) -> Iterator[str]:
    paths = PathList()
    with open(name, "rb") as file:
        while piece := file.read(_READ_BYTES):
            yield from paths.feed(piece)
    yield from paths.feed(b"")


class PathList:
    r"""Cuts a list into paths as its bytes come: one a line, or one before each NUL.

    Lines may end as on Windows. The text may be UTF-8, or UTF-16 with a byte order mark, as
    PowerShell writes it. Blank lines are no paths.

    >>> paths = PathList()
    >>> paths.feed(b"\xef\xbb\xbfa.jpg\r\nb"), paths.feed(b".jpg\r\n\n"), paths.feed(b"c.jpg")
    (['a.jpg'], ['b.jpg'], [])
    >>> paths.feed(b"")
    ['c.jpg']
    """

    def __init__(self) -> None:
        self._begun = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._rest = ""
        self._end = "\n"

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes, none at the end; return the paths that they complete.

        Raises:
            RequestError: A line is longer than any path.
        """
        ended = not data
        if self._decoder is None:
            data = self._begun = self._begun + data
            if len(data) < 2 and not ended:  # half of a byte order mark
                return []
            utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
            self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        text = self._rest + self._decoder.decode(data, ended)
        if "\0" in text:  # no path has one: the list is of the kind of `find -print0`
            self._end = "\0"
        lines = text.split(self._end)
        self._rest = "" if ended else lines.pop()
        if len(self._rest) > _LONGEST:
            raise RequestError(f"a line of the list of paths is over {_LONGEST:,} bytes long")
        if self._end == "\n":
            lines = [line.removesuffix("\r") for line in lines]
        return [os.fsdecode(line.encode("utf-8", "surrogateescape")) for line in lines if line]
