# ruff: noqa: PTH120, PTH123 - paths are strings here, as they stand in lines
r"""The journal of a bulk run: JSONL, a line for each picture, from which the next run goes on.

A line is appended with one write when its picture is done. Whatever ends the program, only
the last line can be incomplete; it is repaired when the file is opened next. A later line
for the same picture and question supersedes an earlier one, which `compact` removes.

A picture is done where its path has a line, and the file's size and time are those in the
line; or, if only the time has changed, the file's SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from moondream_async.cli._files import UNSUPPORTED, flush, replacing
from moondream_async.errors import MoondreamError, RequestError

from .lines import (
    ASKED,
    BEGINNING,
    Key,
    contents_of,
    decode,
    encode,
    key_of,
    read_line,
    text_of,
    tidy,
)
from .sources import Contents, Found, is_same

if TYPE_CHECKING:
    from .questions import Pending

_READ_BYTES = 1 << 20


class Journal:
    """The journal's file, open and locked; it is made where it is missing.

    Args:
        complain: Called with a sentence about what the file system lacks; the run goes on.
        varying: The arguments that differ from picture to picture.
        with_texts: Whether `wrote` will be called; it takes memory for each picture.

    Raises:
        RequestError: The file holds something else, or another run writes it.
        OSError: It can't be opened or repaired.
    """

    def __init__(
        self,
        path: str,
        asked: Mapping[str, Any],
        *,
        complain: Callable[[str], object] = lambda _: None,
        on_line: Callable[[bytes], object] = lambda _: None,
        with_texts: bool = False,
        varying: Container[str] = (),
    ) -> None:
        self.path = path
        self._asked = asked
        self._varying = varying
        self._complain = complain
        self._on_line = on_line
        self._known: dict[Key, tuple[int, Contents | None]] = {}
        """The start of each current line, and the picture's state; None where it failed."""
        self._superseded = False  # whether there are other lines
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

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def has(self, found: Found, asked: Mapping[str, Any]) -> bool:
        """Tell whether a picture is done; this looks at its file, and blocks."""
        _, contents = self._known.get(key_of(found.name, asked), (0, None))
        return contents is not None and is_same(found, contents)

    def answers(self, found: Found, asked: Mapping[str, Any]) -> dict[str, str]:
        """Return the answers that an earlier run got, where other questions failed."""
        start, contents = self._known.get(key_of(found.name, asked), (-1, None))
        if start < 0 or contents is not None or "asks" not in asked:
            return {}
        record = tidy(decode(next(self._lines(start))[1]))
        file = record.get("file")
        if file is None or not is_same(found, Contents(**file)):
            return {}
        return {name: record[name] for name in asked["asks"] if name in record}

    def wrote(self, found: Found, text: str) -> Literal["last", "before"] | None:
        """Tell whether a text is that of a picture's last line, or of the line before."""
        last, before = self._texts.get(_hash(found.name), (None, None))
        digest = _hash(text)
        return "last" if digest == last else "before" if digest == before else None

    def append(self, pending: Pending, fields: Mapping[str, Any]) -> None:
        """Write a picture's line; a line that fails half-way, as on a full disk, is removed.

        Raises:
            OSError: It can't be written.
            MoondreamError: The file was removed or replaced.
        """
        found = pending.found
        record: dict[str, Any] = {"path": found.name, **pending.asked, **fields}
        if found.time is not None:
            record["time"] = found.time
        if found.row:
            record["row"] = found.row
        record |= {"tries": pending.tries, "seconds": round(pending.seconds, 3)}
        if pending.contents is not None:
            record["file"] = pending.contents
        data = encode(record)
        self._check_in_place()
        self._learn(record, self._write(data + b"\n"))
        self._on_line(data)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the current lines with this run's questions."""
        for _, data in self._current():
            record = decode(data)
            if all(map(self._is_asked, ASKED, map(record.get, ASKED))):
                yield tidy(record)

    def _is_asked(self, name: str, value: Any) -> bool:
        """Tell whether an argument in a line is this run's; one that varies always is."""
        own = self._asked.get(name)
        if name == "asks" and isinstance(own, dict) and isinstance(value, dict):
            return own.keys() == value.keys()
        return name in self._varying or value == own

    def compact(self) -> None:
        """Remove superseded lines. The file is replaced only once the new one is whole.

        Raises:
            OSError: The new file can't be written.
            MoondreamError: The file was removed or replaced.
        """
        self._check_in_place()
        if not flush(self._file):
            self._complain(f"{self.path} is on a file system that can't flush files")
        if not self._superseded:
            return
        import fcntl  # noqa: PLC0415 - see _lock

        moved: dict[int, int] = {}
        end = 0
        with replacing(self.path) as file:
            # Locked before it takes the old file's place, so that no other run opens it between.
            new = os.dup(file.fileno())
            try:
                self._lock(new)
                for start, data in self._current():
                    moved[start] = end
                    end += file.write(data + b"\n")
            except BaseException:
                os.close(new)
                raise
        fcntl.fcntl(new, fcntl.F_SETFL, os.O_APPEND)
        os.close(self._file)
        self._file = new
        self._known = {key: (moved[start], state) for key, (start, state) in self._known.items()}
        self._superseded = False

    # -- within -----------------------------------------------------------------------

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        while True:
            self._file = os.open(self.path, flags, 0o666)
            self._lock(self._file)
            if self._in_place():  # else another run has just replaced the file
                return
            self.close()

    def _lock(self, descriptor: int) -> None:
        try:
            import fcntl  # noqa: PLC0415 - missing on Windows, where nothing stops a second run
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
        """Copy the lines elsewhere and raise, where the file was removed or replaced."""
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
                self._learn(read_line(data), start)
            except ValueError:
                raise RequestError(
                    f"{self.path} has other things in it than results (line {number})"
                ) from None
        rest = b"".join(self._pieces(end))
        if rest:
            self._mend(rest, end)

    def _mend(self, rest: bytes, end: int) -> None:
        """Repair a last line that has no end; RequestError where no run leaves such a line."""
        try:
            record = read_line(rest)
        except ValueError:
            if not _is_torn(rest, first=not end):
                raise RequestError(f"{self.path} has other things in it than results") from None
            os.ftruncate(self._file, end)
        else:  # an editor has removed the line break
            self._write(b"\n")
            self._learn(record, end)

    def _learn(self, record: Mapping[str, Any], start: int) -> None:
        name, failed = record["path"], record.get("error") is not None
        key = key_of(name, record)
        self._superseded = self._superseded or key in self._known
        self._known[key] = start, None if failed else contents_of(record.get("file"))
        if self._with_texts and (text := text_of(record)) is not None:
            before, _ = self._texts.get(_hash(name), (None, None))
            self._texts[_hash(name)] = (_hash(text), before)

    def _pieces(self, at: int) -> Iterator[bytes]:
        while data := os.pread(self._file, _READ_BYTES, at):
            at += len(data)
            yield data

    def _lines(self, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield the complete lines from `start` on, without line breaks, and their starts."""
        rest = b""
        for data in self._pieces(start):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield start, line
                start += len(line) + 1

    def _current(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that were not superseded, and their starts."""
        starts = {start for start, _ in self._known.values()} if self._superseded else None
        return (each for each in self._lines() if starts is None or each[0] in starts)

    def _write(self, data: bytes) -> int:
        """Write at the end of the file, all or nothing; return where that was."""
        before = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a full disk takes a part, then the next write fails
                written += os.write(self._file, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise
        return before


def _is_torn(rest: bytes, *, first: bool) -> bool:
    """Tell whether a run was ended within this line; after a power failure it may be zeros."""
    with contextlib.suppress(ValueError):
        decode(rest)
        return False  # the line is whole, and not a run's
    if first:
        return rest.startswith(BEGINNING)
    return rest[: len(BEGINNING)] == BEGINNING[: len(rest)] or not rest.strip(b"\0")


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
