"""Finding pictures while others are asked about, so that a list of paths may be a pipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from moondream_async.errors import MoondreamError

from .lists import PathList
from .search import Search
from .shards import is_shard
from .sources import Found
from .tables import is_table

_CHUNK = 64  # files that one call of a thread looks up
_CHUNK_BYTES = 1 << 24  # of frames and samples, which are read when they are found
_READ_BYTES = 1 << 16
_STDIN = 0  # by its number, since sys.stdin is None where it is closed


class Finder:
    """Finds the pictures that the command's arguments and lists name.

    Args:
        arguments: Files, folders, patterns; ``-`` is a list on stdin.
        lists: Files with paths in them. Each is read once, since it may be a pipe.
        complain: Called with a sentence about an argument that gives no pictures.
        options: Further options of `Search`.
    """

    def __init__(
        self,
        arguments: list[str],
        lists: list[str],
        complain: Callable[[str], object] = lambda _: None,
        **options: Any,
    ) -> None:
        self.search = Search(complain, **options)
        self._options = options
        # A table is read as a table also where it is named as a list.
        self._named = [each for each in arguments if each != "-"] + list(filter(is_table, lists))
        self._lists = [each for each in lists if not is_table(each)]
        self._stdin = "-" in arguments

    @property
    def may_repeat(self) -> bool:
        """Whether a file may be found twice; in one folder each is found once."""
        return len(self._named) + len(self._lists) > 1 or any(
            (self._lists, self._stdin, *map(is_table, self._named), *map(is_shard, self._named))
        )

    async def chunks(self) -> AsyncGenerator[list[Found], None]:
        """Yield what is found, some at a time."""
        async for chunk in _in_chunks(self.search.find(self._named)):
            yield chunk
        for name in self._lists:
            with explained("read", name):
                file = await anyio.to_thread.run_sync(_open, name, abandon_on_cancel=True)
            try:
                async for chunk in self._listed(file, name):
                    yield chunk
            finally:
                os.close(file)
        if self._stdin:
            async for chunk in self._listed(_STDIN, "stdin"):
                yield chunk

    async def count(self) -> int | None:
        """Return how many pictures there are; None where that can't be known beforehand."""
        if self._stdin or not all(map(os.path.isfile, self._lists)):
            return None
        search, total = Search(**self._options, at_once=True), 0
        try:
            total = await _length(search.find(self._named))
            for name in self._lists:
                total += await _length(search.find(_paths_in(name)))
        except (OSError, MoondreamError):  # `chunks` raises it, too
            return None
        return total

    async def _listed(self, file: int, name: str) -> AsyncGenerator[list[Found], None]:
        paths = PathList()
        ended = False
        while not ended:
            # Not in a thread, where a blocked read could not be cancelled. Regular files
            # never block, and can't be waited for.
            with contextlib.suppress(OSError, NotImplementedError):
                await anyio.wait_readable(file)
            with explained("read", name):
                piece = os.read(file, _READ_BYTES)
            ended = not piece
            async for chunk in _in_chunks(
                self.search.find(paths.feed(piece) if piece else paths.close())
            ):
                yield chunk


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


async def _length(found: Iterator[Found]) -> int:
    total = 0
    async for chunk in _in_chunks(found, 1000):
        total += len(chunk)
    return total


def _paths_in(name: str) -> Iterator[str]:
    paths = PathList()
    with Path(name).open("rb") as file:
        for piece in iter(partial(file.read, _READ_BYTES), b""):
            yield from paths.feed(piece)
    yield from paths.close()


def _open(name: str) -> int:
    return os.open(name, os.O_RDONLY | getattr(os, "O_BINARY", 0))
