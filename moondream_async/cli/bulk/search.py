# ruff: noqa: PTH112, PTH113, PTH119, PTH122, PTH207 - strings cost less for each of a million files
"""Finding pictures: in folders, by patterns, in tables, or named. All of it blocks.

Each picture is yielded when it is found, in the order in which the disk lists it, so
that a million files cost no more memory than one.
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

    Hidden files and folders are left out, and links to folders are not followed. A named
    file that doesn't exist is yielded, too: reading it fails with the reason.

    Args:
        complain: Called with a sentence about an argument that can't be read, or gives no
            pictures. The search goes on.
        include: Patterns; a file's name, or its path in its folder, must match one of them.
        exclude: Patterns that a file must not match.
        column: A table's column of pictures, or the end of a shard's pictures' names.
        every: Seconds between two frames of a video; None is for all of them.
        at_once: Refuse videos and shards: their pictures can only be counted by reading all.
        is_own: Tells whether this run writes a file; `left_out` does not count such files.
    """

    def __init__(
        self,
        complain: Callable[[str], object] = lambda _: None,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        column: str | None = None,
        every: float | None = None,
        at_once: bool = False,
        is_own: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.left_out: Counter[str] = Counter()
        """How many other files the folders have, by the end of their names."""
        self._complain = complain
        self._include, self._exclude = include, exclude
        self._column, self._every, self._at_once = column, every, at_once
        self._is_own = is_own

    def find(self, arguments: Iterable[str]) -> Iterator[Found]:
        """Yield the files that arguments mean, as far as `include` and `exclude` let them.

        Raises:
            RequestError: A table has no such column, or is none.
        """
        for given in arguments:
            for argument in expand(given) if is_shard(given) else [given]:
                for file in self._files(argument):
                    yield from filter(self._is_wanted, self._opened(file))

    def _is_wanted(self, found: Found) -> bool:
        def matches(pattern: str) -> bool:
            return fnmatch(found.below, pattern) or fnmatch(os.path.basename(found.path), pattern)

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
            return self._or_complain(_matches(argument), argument, "list", "no file matches")
        return iter([Found(argument if is_remote(argument) else simplest(argument), below)])

    def _opened(self, file: Found) -> Iterator[Found]:
        """Yield a file, or in place of a video or a shard the pictures in it."""
        path = file.path
        if file.row is not None or not (is_video(path) or is_shard(path)):
            return iter([file])
        if self._at_once:
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


def _matches(pattern: str) -> Iterator[Found]:
    for path in glob.iglob(pattern, recursive=True):
        if not os.path.isdir(path):
            yield Found(simplest(path), os.path.basename(path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False  # then reading it as a picture fails with the reason
