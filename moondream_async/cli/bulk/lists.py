"""Lists of paths, as people and programs write them."""

from __future__ import annotations

import codecs
import os

from moondream_async.errors import RequestError

_LONGEST = 1 << 20  # characters of a path; no system takes a hundredth of that


class PathList:
    r"""Cuts a list into paths as its bytes come: one a line, or one before each NUL.

    Lines may end as on Windows. The text may be UTF-8, or UTF-16 with a byte order mark, as
    PowerShell writes it. Blank lines are no paths.

    >>> paths = PathList()
    >>> paths.feed(b"\xef\xbb\xbfa.jpg\r\nb"), paths.feed(b".jpg\r\n\n"), paths.feed(b"c.jpg")
    (['a.jpg'], ['b.jpg'], [])
    >>> paths.close()
    ['c.jpg']
    """

    def __init__(self) -> None:
        self._begun = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._rest = ""
        self._end = "\n"

    def feed(self, data: bytes) -> list[str]:
        """Take the next bytes; return the paths that they complete.

        Raises:
            RequestError: A line is longer than any path.
        """
        *lines, self._rest = self._split(data)
        if len(self._rest) > _LONGEST:
            raise RequestError(f"a line of the list of paths is over {_LONGEST:,} bytes long")
        return self._paths(lines)

    def close(self) -> list[str]:
        """Return the last path, where no line break ends it."""
        return self._paths(self._split(b"", final=True))

    def _split(self, data: bytes, *, final: bool = False) -> list[str]:
        if self._decoder is None:
            data = self._begun = self._begun + data
            if len(data) < 2 and not final:  # half of a byte order mark
                return [""]
            utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
            self._decoder = codecs.getincrementaldecoder(encoding)(errors)
        text = self._rest + self._decoder.decode(data, final)
        if "\0" in text:  # no path has one: the list is of the kind of `find -print0`
            self._end = "\0"
        return text.split(self._end)

    def _paths(self, lines: list[str]) -> list[str]:
        if self._end == "\n":
            lines = [line.removesuffix("\r") for line in lines]
        return [os.fsdecode(line.encode("utf-8", "surrogateescape")) for line in lines if line]
