# ruff: noqa: PTH105, PTH108, PTH123 - paths are strings here, as they stand in lines
r"""The file that a bulk run writes and goes on from: JSONL, a line for each picture.

A line is appended with one write when its picture is done, so that whatever ends
the program leaves whole lines, but for the last one at most. That is repaired
when the file is opened next. A line that says how a picture failed is overtaken
by a later one for the same picture and the same question; `compact` then drops
the first.

A picture is known by its path. It is done where its file's size and time are
those of the line, or, if only the time has changed, its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from moondream_async.errors import APIStatusError, MoondreamError, RequestError
from moondream_async.results import Result

from .sources import Contents, Found, is_same

if TYPE_CHECKING:
    from typing import Self

_ASKED = ("skill", "question", "object", "length", "reasoning", "model", "settings")
_READ_BYTES = 1 << 20

Key = bytes


class _Line(msgspec.Struct):
    """What is looked at in a line."""

    path: str
    skill: str
    question: str | None = None
    object: str | None = None
    length: str | None = None
    reasoning: Any = None
    model: str | None = None
    settings: Any = None
    error: Any = None
    file: Contents | None = None


class Journal:
    """The file, open and locked.

    Args:
        path: Where it is, or is to be.
        asked: What this run asks: the skill and its arguments, as they stand in lines.

    Raises:
        RequestError: It holds something else, or another run writes it.
        OSError: It can't be opened or repaired.
    """

    def __init__(self, path: str, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.asked = {name: value for name, value in asked.items() if value is not None}
        self.remember = False
        """Whether `has` is to know what this run appends, too; it takes memory for each."""
        self._known: dict[Key, Contents | None] = {}  # None for what failed
        self._again: set[Key] = set()  # what has more than one line
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._file = os.open(path, flags, 0o666)
        try:
            self._lock()
            self._load()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, found: Found) -> bool:
        """Tell whether a picture is done. Looks at its file, and so blocks."""
        contents = self._known.get(self._key(found.name, self.asked))
        return contents is not None and is_same(found.path, contents)

    def append(
        self,
        found: Found,
        contents: Contents | None,
        outcome: Result | MoondreamError | Mapping[str, Any],
        *,
        tries: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Write what became of a picture: whole, or not at all.

        Raises:
            OSError: It can't be written, as on a full disk.
        """
        record: dict[str, Any] = {"path": found.name, **self.asked}
        if isinstance(outcome, Result):
            fields: dict[str, Any] = {**outcome}
            # `reasoning` of a query: what was thought stands under another name than whether to.
            thought = fields.pop("reasoning", None)
            record |= fields | ({"reasoning_text": thought["text"]} if thought else {})
        elif isinstance(outcome, MoondreamError):
            record["error"] = describe(outcome)
        else:
            record |= outcome
        record |= {"tries": tries, "seconds": round(seconds, 3)}
        if contents is not None:
            record["file"] = contents
        self._write(msgspec.json.encode(record) + b"\n")
        key = self._key(found.name, self.asked)
        if key in self._known:
            self._again.add(key)
        if self.remember:
            self._known[key] = None if "error" in record else contents

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of what this run asks, those that were overtaken left out."""
        last = self._last_lines()
        for start, data in self._lines():
            if last.get(self._key_of(data), start) == start:
                record = msgspec.json.decode(data)
                if all(record.get(name) == self.asked.get(name) for name in _ASKED):
                    yield record

    def compact(self) -> None:
        """Drop the lines that were overtaken. What was there stays until all of it is ready.

        Raises:
            OSError: It can't be written.
        """
        os.fsync(self._file)
        if not self._again:
            return
        last = self._last_lines()
        with replacing(self.path) as file:
            for start, data in self._lines():
                if last.get(self._key_of(data), start) == start:
                    file.write(data + b"\n")
        self._again.clear()

    # -- within -----------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            import fcntl  # noqa: PLC0415 - not on Windows, where two runs are the user's care
        except ImportError:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"Another run is writing {self.path}") from None

    def _load(self) -> None:
        end = 0
        for number, (start, data) in enumerate(self._lines(), 1):
            end = start + len(data) + 1
            try:
                line = msgspec.json.decode(data, type=_Line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise RequestError(
                    f"{self.path} has other things in it than results (line {number})"
                ) from None
            key = self._key(line.path, msgspec.structs.asdict(line))
            if key in self._known:
                self._again.add(key)
            self._known[key] = None if line.error is not None else line.file
        # What follows was not written to its end.
        if os.fstat(self._file).st_size > end:
            torn = os.pread(self._file, 1, end)
            if torn not in (b"{", b"\0"):
                raise RequestError(f"{self.path} has other things in it than results")
            os.ftruncate(self._file, end)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the whole lines, without their ends, and where they start."""
        start, at, rest = 0, 0, b""
        while data := os.pread(self._file, _READ_BYTES, at):
            at += len(data)
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield start, line
                start += len(line) + 1

    def _last_lines(self) -> dict[Key, int]:
        """Return where the last line is of each picture that has several."""
        if not self._again:
            return {}
        keys = ((self._key_of(data), start) for start, data in self._lines())
        return {key: start for key, start in keys if key in self._again}

    def _key_of(self, data: bytes) -> Key:
        if not self._again:
            return b""
        line = msgspec.json.decode(data, type=_Line)
        return self._key(line.path, msgspec.structs.asdict(line))

    @staticmethod
    def _key(path: str, asked: Mapping[str, Any]) -> Key:
        about = [path, *(asked.get(name) for name in _ASKED)]
        return hashlib.blake2b(msgspec.json.encode(about), digest_size=16).digest()

    def _write(self, data: bytes) -> None:
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a full disk takes a part, and fails the next write
                written += os.write(self._file, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise


def describe(error: MoondreamError) -> dict[str, Any]:
    """Return an error as it stands in a line."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, APIStatusError):
        described["status"] = error.status
    return described


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Any]:
    """Open a binary file that takes the place of `path` when it is complete, at once.

    With `sync`, also where the machine loses its power meanwhile.

    Raises:
        OSError: It can't be written; `path` is as it was.
    """
    beside = f"{os.fspath(path)}.new"
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
