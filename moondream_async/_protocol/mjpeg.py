r"""Motion JPEG over HTTP: pictures in the parts of a ``multipart/x-mixed-replace`` body.

Cameras differ in the boundary (two dashes too many or too few), in lengths and in line ends. So
the parser is lenient: it skips the head of a part, takes the length that the head gives, and
without a length ends the picture where the next boundary begins. A part that does not begin as
a JPEG is dropped.
"""

from __future__ import annotations

from moondream_async.errors import ImageError

_MAX_HEAD_BYTES = 16 * 1024
_START = b"\xff\xd8\xff"


class MJPEGParser:
    r"""Turns the bytes of a camera's stream into whole pictures.

    Args:
        boundary: The boundary in the content type.
        max_image_bytes: The limit of one picture, and so of the memory that is used.

    >>> parser = MJPEGParser("frame")
    >>> parser.feed(b"--frame\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff..\r\n--fra")
    []
    >>> parser.feed(b"me\r\n")
    [b'\xff\xd8\xff..']
    """

    def __init__(self, boundary: str, *, max_image_bytes: int = 20_000_000) -> None:
        self._boundary = b"--" + boundary.strip().strip('"').lstrip("-").encode()
        self._max = max_image_bytes
        self._data = bytearray()
        self._searched = 0  # bytes of `_data` in which no boundary begins
        self._in_picture = False
        self._length: int | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes; return the pictures that they complete.

        Raises:
            ImageError: A picture or the head of a part is over its limit; the stream can't be
                read on.
        """
        self._data += data
        pictures = []
        while (found := self._next()) is not None:
            if found.startswith(_START):
                pictures.append(found)
        limit = self._max if self._in_picture else _MAX_HEAD_BYTES
        if len(self._data) > limit + len(self._boundary) + 4:
            raise ImageError(f"A part of the camera's stream is over {limit} bytes")
        return pictures

    def _next(self) -> bytes | None:
        """Return the next part, or b"" after a head; None if more bytes are needed."""
        if not self._in_picture:
            return b"" if self._read_head() else None
        if self._length is not None:
            if len(self._data) < self._length:
                return None
            return self._cut(self._length, self._length)
        at = self._data.find(self._boundary, self._searched)
        if at < 0:
            self._searched = max(0, len(self._data) - len(self._boundary))
            return None
        end = at
        while end and self._data[end - 1] in b"-\r\n" and at - end < 4:
            end -= 1
        return self._cut(end, at)

    def _cut(self, end: int, rest: int) -> bytes:
        part = bytes(self._data[:end])
        del self._data[:rest]
        self._in_picture, self._searched = False, 0
        return part

    def _read_head(self) -> bool:
        """Skip to the picture of the next part."""
        at = self._data.find(self._boundary, self._searched)
        if at < 0:
            keep = len(self._boundary)
            del self._data[:-keep]
            self._searched = 0
            return False
        del self._data[:at]
        ends = [
            (found, len(blank))
            for blank in (b"\r\n\r\n", b"\n\n")
            if (found := self._data.find(blank)) >= 0
        ]
        if not ends:
            return False
        found, size = min(ends)
        head = bytes(self._data[:found])
        del self._data[: found + size]
        self._in_picture, self._searched, self._length = True, 0, None
        for line in head.lower().splitlines():
            name, _, value = line.partition(b":")
            text = value.strip()
            if name.strip() == b"content-length" and text.isdigit() and len(text) < 12:
                self._length = int(text)
        if self._length is not None and self._length > self._max:
            raise ImageError(f"A part of the camera's stream is over {self._max} bytes")
        return True
