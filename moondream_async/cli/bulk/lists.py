"""Lists of paths, as people and programs write them."""

from __future__ import annotations

import codecs
import os

from moondream_async.errors import RequestError

_LONGEST = 1 << 20  # bytes of a path; no system takes a hundredth of it


class PathList:
    r"""Cuts a list into paths as its bytes come: one a line, or one before each NUL.

    Line breaks may be those of Windows, and the text may be UTF-8 or UTF-16 with a byte
    order mark, as editors and PowerShell write it. Blank lines are no paths.

    >>> paths = PathList()
    >>> paths.feed(b"\xef\xbb\xbfa.jpg\r\nb"), paths.feed(b".jpg\r\n\n"), paths.feed(b"c.jpg")
    (['a.jpg'], ['b.jpg'], [])
    >>> paths.close()
    ['c.jpg']
    """

    def __init__(self) -> None:
        self._rest = b""
        self._begun = False
        self._end = b"\n"
        self._utf16: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes; return the paths that they complete.

        Raises:
            RequestError: A line is longer than any path.
        """
        if not self._begun:
            data, self._rest = self._rest + data, b""
            if len(data) < 3:  # a byte order mark may go on
                self._rest = data
                return []
            data = self._begin(data)
        *whole, self._rest = self._split(self._decoded(data))
        if len(self._rest) > _LONGEST:
            raise RequestError(f"a line of the list of paths is over {_LONGEST:,} bytes long")
        return [os.fsdecode(line) for each in whole if (line := self._stripped(each))]

    def close(self) -> list[str]:
        """Return the last path, where nothing stands behind it."""
        rest, self._rest = self._rest, b""
        if not self._begun:
            rest = self._decoded(self._begin(rest))
        return [os.fsdecode(line) for each in self._split(rest) if (line := self._stripped(each))]

    def _begin(self, data: bytes) -> bytes:
        self._begun = True
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self._utf16 = codecs.getincrementaldecoder("utf-16")("replace")
        return data.removeprefix(codecs.BOM_UTF8)

    def _decoded(self, data: bytes) -> bytes:
        return data if self._utf16 is None else self._utf16.decode(data).encode("utf-8", "replace")

    def _split(self, data: bytes) -> list[bytes]:
        data = self._rest + data
        if b"\0" in data:  # no path has one: the list is of the kind of `find -print0`
            self._end = b"\0"
        return data.split(self._end)

    def _stripped(self, line: bytes) -> bytes:
        return line if self._end == b"\0" else line.removesuffix(b"\r")
