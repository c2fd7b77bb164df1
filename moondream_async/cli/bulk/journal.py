# ruff: noqa: PTH120, PTH123 - paths are strings here, as they stand in lines
r"""The file that a bulk run writes and goes on from: JSONL, a line for each picture.

A line is appended with one write when its picture is done, so that whatever ends
the program leaves whole lines, but for the last one at most. That is repaired
when the file is opened next. A line is superseded by a later one for the same
picture and the same question; `compact` then drops the first.

A picture is known by its path. It is done where its file's size and time are
those of the line, or, if only the time has changed, its SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, Literal, Self

import msgspec

from moondream_async.cli._files import UNSUPPORTED, flush, replacing
from moondream_async.errors import MoondreamError, RequestError

from .lines import (
    ASKED,
    BEGINNING,
    Key,
    Line,
    Outcome,
    decode,
    encode,
    fields_of,
    key_of,
    read_line,
    text_of,
    tidy,
)
from .sources import Contents, Found, is_same

_READ_BYTES = 1 << 20


class Journal:
    """The file, open and locked.

    Args:
        path: Where it is, or is to be.
        asked: What this run asks: the skill and its arguments, as they stand in lines.
        complain: Called with what the file system can't do, though the run goes on.
        on_line: Called with each record that is written, encoded.
        varying: What of `asked` differs from picture to picture.
        with_texts: Whether `wrote` will be asked; that takes memory for each picture.

    Raises:
        RequestError: It holds something else, or another run writes it.
        OSError: It can't be opened or repaired.
    """

    def __init__(
        self,
        path: str,
        asked: Mapping[str, Any],
        *,
        complain: Callable[[str], object] | None = None,
        on_line: Callable[[bytes], object] | None = None,
        with_texts: bool = False,
        varying: Container[str] = (),
    ) -> None:
        self.path = path
        self.asked = {name: value for name, value in asked.items() if value is not None}
        self._complain = complain or (lambda _: None)
        self._on_line = on_line
        self._known: dict[Key, Contents | None] = {}  # None for what failed
        self._varying = varying
        self._in_part: dict[Key, int] = {}  # where a line has answers to some questions
        self._again: set[Key] = set()  # what has more than one line
        self._with_texts = with_texts
        self._texts: dict[bytes, tuple[bytes, bytes | None]] = {}  # hashes of names and texts
        self._file = -1
        try:
            self._open()
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

    def has(self, found: Found, asked: Mapping[str, Any] | None = None) -> bool:
        """Tell whether a picture is done. Looks at its file, and so blocks."""
        contents = self._known.get(key_of(found.name, asked or self.asked))
        return contents is not None and is_same(found, contents)

    def answers(self, found: Found, asked: Mapping[str, Any]) -> dict[str, str]:
        """Return the answers there are to some of several questions, where others failed."""
        start = self._in_part.get(key_of(found.name, asked))
        if start is None:
            return {}
        data = next(self._lines(start), (0, b"{}"))[1]
        record = tidy(decode(data))
        file = record.get("file")
        if file is None or not is_same(found, Contents(**file)):
            return {}
        return {name: record[name] for name in asked.get("asks", ()) if name in record}

    def wrote(self, found: Found, text: str) -> Literal["last", "before"] | None:
        """Tell whether a text is the last that a line has about a picture, or the one before."""
        last, before = self._texts.get(_hash(found.name), (None, None))
        digest = _hash(text)
        return "last" if digest == last else "before" if digest == before else None

    def append(
        self,
        found: Found,
        contents: Contents | None,
        outcome: Outcome,
        *,
        asked: Mapping[str, Any] | None = None,
        tries: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Write what became of a picture: whole, or not at all.

        Raises:
            OSError: It can't be written, as on a full disk.
            MoondreamError: The file is no longer where it was.
        """
        asked = self.asked if asked is None else asked
        record: dict[str, Any] = {"path": found.name, **asked, **fields_of(outcome)}
        if found.time is not None:
            record["time"] = found.time
        if found.row:
            record["row"] = found.row
        record |= {"tries": tries, "seconds": round(seconds, 3)}
        if contents is not None:
            record["file"] = contents
        data = encode(record)
        self._check_in_place()
        self._write(data + b"\n")
        failed = "error" in record
        self._learn(key_of(found.name, asked), None if failed else contents)
        self._remember_text(found.name, text_of(record))
        if self._on_line is not None:
            self._on_line(data)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of what this run asks, those that were superseded left out."""
        for data in self._current():
            record = decode(data)
            if all(map(self._is_asked, ASKED, map(record.get, ASKED))):
                yield tidy(record)

    def _is_asked(self, name: str, value: Any) -> bool:
        """Tell whether a line says what this run asks, as far as that is the same for all."""
        own = self.asked.get(name)
        if name == "asks" and isinstance(own, dict) and isinstance(value, dict):
            return own.keys() == value.keys()
        return name in self._varying or value == own

    def compact(self) -> None:
        """Drop the lines that were superseded. What was there stays until all of it is ready.

        Raises:
            OSError: It can't be written.
            MoondreamError: The file is no longer where it was.
        """
        self._check_in_place()
        if not flush(self._file):
            self._complain(f"{self.path} is on a file system that can't flush files")
        if not self._again:
            return
        import fcntl  # noqa: PLC0415 - see _lock

        with replacing(self.path) as file:
            # The next run must find the new file locked, as this one finds the old.
            new = os.dup(file.fileno())
            try:
                self._lock(new)
                file.writelines(data + b"\n" for data in self._current())
            except BaseException:
                os.close(new)
                raise
        fcntl.fcntl(new, fcntl.F_SETFL, os.O_APPEND)
        os.close(self._file)
        self._file = new
        self._again.clear()

    # -- within -----------------------------------------------------------------------

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        while True:
            self._file = os.open(self.path, flags, 0o666)
            self._lock(self._file)
            if self._in_place():  # else another run has just compacted it
                return
            self.close()

    def _lock(self, descriptor: int) -> None:
        try:
            import fcntl  # noqa: PLC0415 - not on Windows, where two runs are the user's care
        except ImportError:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"Another run is writing {self.path}") from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._complain(
                f"{self.path} is on a file system without locks: let no second run write it"
            )

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file))  # noqa: PTH116
        except OSError:
            return False

    def _check_in_place(self) -> None:
        """Refuse to go on writing where nobody will find it.

        Raises:
            MoondreamError: The file was removed or replaced; it says where the lines are.
        """
        if not self._in_place():
            raise MoondreamError(
                f"{self.path} was removed or replaced while this run wrote it; "
                f"its lines are in {self._rescue()}"
            )

    def _rescue(self) -> str:
        beside = os.path.dirname(os.path.abspath(self.path))  # noqa: PTH100
        for folder in (beside, None):
            with contextlib.suppress(OSError):
                file, path = tempfile.mkstemp(".jsonl", "moondream-rescued-", folder)
                with open(file, "wb") as copy:
                    copy.writelines(data + b"\n" for _, data in self._lines())
                return path
        return "no file: there was no room for them"

    def _load(self) -> None:
        end = 0
        for number, (start, data) in enumerate(self._lines(), 1):
            end = start + len(data) + 1
            try:
                self._take(read_line(data), start)
            except ValueError:
                raise RequestError(
                    f"{self.path} has other things in it than results (line {number})"
                ) from None
        rest = b"".join(self._pieces(end))
        if rest:
            self._mend(rest, end)

    def _mend(self, rest: bytes, end: int) -> None:
        """Mend a last line that has no end.

        Raises:
            RequestError: It is nothing that a run leaves behind.
        """
        try:
            line = read_line(rest)
        except ValueError:
            if not _is_torn(rest, first=not end):
                raise RequestError(f"{self.path} has other things in it than results") from None
            os.ftruncate(self._file, end)
        else:  # an editor took the line break
            self._write(b"\n")
            self._take(line, end)

    def _take(self, line: Line, start: int) -> None:
        key = line.key
        self._learn(key, line.contents)
        self._in_part.pop(key, None)
        if line.asks and line.error is not None:
            self._in_part[key] = start
        self._remember_text(line.path, text_of(msgspec.structs.asdict(line)))

    def _remember_text(self, name: str, text: str | None) -> None:
        if self._with_texts and text is not None:
            before, _ = self._texts.get(_hash(name), (None, None))
            self._texts[_hash(name)] = (_hash(text), before)

    def _learn(self, key: Key, contents: Contents | None) -> None:
        if key in self._known:
            self._again.add(key)
        self._known[key] = contents

    def _pieces(self, at: int) -> Iterator[bytes]:
        while data := os.pread(self._file, _READ_BYTES, at):
            at += len(data)
            yield data

    def _lines(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield the whole lines from one on, without their ends, and where they start."""
        rest = b""
        for data in self._pieces(start):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield start, line
                start += len(line) + 1

    def _current(self) -> Iterator[bytes]:
        """Yield the lines that were not superseded."""
        last: dict[Key, int] = {}
        if self._again:
            for start, data in self._lines():
                if (key := read_line(data).key) in self._again:
                    last[key] = start
        for start, data in self._lines():
            if not self._again or last.get(read_line(data).key, start) == start:
                yield data

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


def _is_torn(rest: bytes, *, first: bool) -> bool:
    """Tell whether a line was not written to its end; or, when the power was lost, not at all."""
    with contextlib.suppress(ValueError):
        decode(rest)
        return False  # it is whole, and nothing of ours
    if first:
        return rest.startswith(BEGINNING)
    return rest[: len(BEGINNING)] == BEGINNING[: len(rest)] or not rest.strip(b"\0")


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
