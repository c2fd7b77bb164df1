# ruff: noqa: PTH112, PTH113, PTH119, PTH122, PTH207 - strings cost less for each of a million files
"""Finding pictures: in folders, by patterns, in tables, or named. It all blocks.

Nothing is gathered: what is found is yielded at once, in the order in which the
disk has it, so that a million files cost no more memory than one.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch

from moondream_async._images import can_prepare
from moondream_async.errors import RequestError

from .names import name_of, simplest
from .remote import find_remote, is_remote
from .shards import expand, find_samples, is_shard
from .sources import Found
from .tables import find_in_table, is_table
from .video import find_frames, is_video


class Search:
    """Finds the files that arguments mean: folders with all below them, patterns, and files.

    Hidden files and folders are left out, and links to folders are not followed. A file
    that doesn't exist is found, for it to be told.

    Args:
        complain: Called with what can't be searched, as a folder that can't be read, or
            gives nothing. The search goes on.
        include: Patterns of which a file's name, or its path in its folder, matches one.
        exclude: Patterns of which it matches none.
        column: Which column of a table has the pictures, or what a shard's pictures' names
            end in.
        every: Seconds between two frames of a video; None is for all of them.
        at_once: Refuse videos and shards, of which nobody knows what is in them but who reads
            all of it.
    """

    def __init__(
        self,
        complain: Callable[[str], object] | None = None,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        column: str | None = None,
        every: float | None = None,
        at_once: bool = False,
    ) -> None:
        self.left_out: Counter[str] = Counter()
        """How many files were passed over in folders, by the end of their names."""
        self._complain = complain or (lambda _: None)
        self._include, self._exclude = include, exclude
        self._column, self._every, self._at_once = column, every, at_once

    def find(self, arguments: Iterable[str]) -> Iterator[Found]:
        """Yield the files that arguments mean, but for those that are to be left out.

        Raises:
            RequestError: A table has no such column, or is none.
        """
        return filter(self._is_wanted, self._find(arguments))

    def _is_wanted(self, found: Found) -> bool:
        def matches(pattern: str) -> bool:
            return fnmatch(found.below, pattern) or fnmatch(os.path.basename(found.path), pattern)

        included = not self._include or any(map(matches, self._include))
        return included and not any(map(matches, self._exclude))

    def _find(self, arguments: Iterable[str]) -> Iterator[Found]:
        for given in arguments:
            for argument in expand(given) if is_shard(given) else [given]:
                yield from self._opened(self._files(argument))

    def _files(self, argument: str) -> Iterator[Found]:
        below = os.path.basename(argument)
        if is_table(argument) and os.path.isfile(argument):
            found = find_in_table(argument, self._column)
            return self._or_complain(found, "there is no row in", argument)
        if is_remote(argument) and (glob.has_magic(argument) or not is_shard(argument)):
            return self._or_complain(self._remote(argument), "there is no picture in", argument)
        if os.path.isdir(argument):
            return self._or_complain(self._walk(argument), "there is no picture in", argument)
        if glob.has_magic(argument) and not os.path.lexists(argument):
            return self._or_complain(_matches(argument), "no file matches", argument)
        return iter([Found(argument if is_remote(argument) else simplest(argument), below)])

    def _opened(self, files: Iterator[Found]) -> Iterator[Found]:
        """Yield files, and in place of videos and shards what is in them."""
        for file in files:
            path = file.path
            streamed = self._video if is_video(path) else self._shard if is_shard(path) else None
            if streamed is None or file.row is not None:
                yield file
            elif self._at_once:
                raise RequestError(f"{file.name}: what is in it is known when it was read")
            else:
                yield from streamed(path)

    def _or_complain(self, found: Iterator[Found], what: str, argument: str) -> Iterator[Found]:
        first = next(found, None)
        if first is None:
            self._complain(f"{what} {name_of(argument)}")
            return
        yield first
        yield from found

    def _video(self, path: str) -> Iterator[Found]:
        try:
            yield from find_frames(path, self._every)
        except OSError as error:
            self._complain(f"can't read {name_of(path)}: {error.strerror or error}")

    def _shard(self, path: str) -> Iterator[Found]:
        samples = find_samples(path, self._column, self.left_out, self._complain)
        try:
            yield from self._or_complain(samples, "there is no picture in", path)
        except OSError as error:
            self._complain(f"can't read {name_of(path)}: {error.strerror or error}")

    def _remote(self, argument: str) -> Iterator[Found]:
        try:
            for address, below in find_remote(argument, self.left_out):
                yield Found(address, below)
        except OSError as error:
            self._complain(f"can't list {name_of(argument)}: {error.strerror or error}")

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
