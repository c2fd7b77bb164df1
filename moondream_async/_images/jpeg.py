"""JPEG: cut out the metadata, and tell whether it is an ordinary one. ITU-T T.81, Annex B.

Only ordinary files are called plain: 8 bits, Huffman coded, grey or three
colours, every table well formed and there before it is used. Such a file opens
in any decoder without ours having tried. The others are legal perhaps, and
rare; they are decoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from moondream_async.errors import ImageError

from .header import Header, exif_orientation

_DHT, _SOI, _EOI, _SOS, _DQT, _DNL, _DRI = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_KEPT: Final = frozenset(range(0xC0, 0xD0)) | {_SOS, _DQT, _DNL, _DRI}  # frames, tables, scans
_STANDALONE: Final = frozenset(range(0xD0, 0xD9)) | {0x01}  # RST, SOI, TEM: no length follows

_MARKER: Final = re.compile(rb"\xff{1,64}([\x01-\xfe])")  # with fill bytes, as T.81 allows
# In entropy-coded data an FF is followed by 00 (it was data), by a restart
# marker, by another FF (fill), or the data is over.
_END_OF_SCAN: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_WINDOW: Final = 1 << 20  # `re` holds the GIL; a MiB takes it less than a millisecond

_CUT_SHORT: Final = "is cut short: a JPEG without an end"
_DAMAGED: Final = "is damaged: a JPEG with something else where a marker must be"
_MAX_SCANS: Final = 200  # encoders write about ten; each costs the decoder one more pass
_MAX_SEGMENTS: Final = 10_000  # an ICC profile has at most 255, a scan three


def parse(data: bytes) -> Header:
    """Walk a JPEG from its beginning to the first end-of-image marker.

    Kept are tables, frame and scans, JFIF without its thumbnail, Adobe's colour
    transform, ICC profiles. All else goes: EXIF, XMP, IPTC, comments, further
    pictures, and what follows the end.

    Raises:
        ImageError: It ends before its picture does, or is no JPEG throughout.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = []
    start = end = 0  # what lies between is kept and not yet in `kept`
    frame = _Frame()
    orientation = 1
    for marker, begin, body, end in _segments(data):
        replacement = _replacement(marker, body)
        if replacement is not None:
            kept += (view[start:begin], replacement)
            start = end
        if marker == _APP1 and orientation == 1 and body.startswith(b"Exif\0\0"):
            orientation = exif_orientation(body)
        frame.read(marker, body)
    kept.append(view[start:end])
    if not frame.scans:
        raise ImageError("is a JPEG without a picture in it")
    if frame.scans > _MAX_SCANS:
        raise ImageError(f"is no ordinary JPEG: it has {frame.scans} scans")
    return Header(
        media_type="image/jpeg",
        width=frame.width,
        height=frame.height,
        kept=kept,
        plain=frame.complete,
        orientation=orientation,
    )


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """Yield marker, beginning, body and end of all segments after SOI, up to and with EOI.

    A scan's end is that of its entropy-coded data; its body is its header only.
    """
    at = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.match(data, at)
        if found is None:
            raise ImageError(_CUT_SHORT if at >= len(data) - 1 else _DAMAGED)
        marker, begin, after = found[1][0], at, found.end()
        if marker == _EOI or marker in _STANDALONE:
            yield marker, begin, b"", after
            if marker == _EOI:
                return
            at = after
            continue
        at = after + int.from_bytes(data[after : after + 2], "big")
        if at > len(data):
            raise ImageError(_CUT_SHORT)
        if at < after + 2:
            raise ImageError(_DAMAGED)
        body = data[after + 2 : at]
        if marker == _SOS:
            at = _end_of_scan(data, at)
        yield marker, begin, body, at
    raise ImageError(f"is no ordinary JPEG: it has more than {_MAX_SEGMENTS:,} segments")


def _replacement(marker: int, body: bytes) -> bytes | None:
    """Return what a segment is replaced by: None to keep it as it is, nothing to drop it."""
    if marker in _KEPT or marker == _EOI or (marker == _APP2 and body.startswith(b"ICC_PROFILE\0")):
        return None
    if marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        if len(body) == 14 and body.endswith(b"\0\0"):
            return None
        return b"\xff\xe0\x00\x10" + body[:12] + b"\0\0"  # a thumbnail of 0 by 0
    if marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        return None if len(body) == 12 else b"\xff\xee\x00\x0e" + body[:12]
    return b""


def _end_of_scan(data: bytes, at: int) -> int:
    """Return where the next marker after the entropy-coded data at `at` begins."""
    while at < len(data):
        found = _END_OF_SCAN.search(data, at, at + _WINDOW)
        if found:
            return found.start()
        at += _WINDOW - 1  # a marker may lie across the edge
    raise ImageError(_CUT_SHORT)


class _Frame:
    """The picture that tables, frame header and scan headers describe, and whether they are sound.

    What is refused here is what libjpeg stops at, and a little more.
    """

    def __init__(self) -> None:
        self.width = self.height = self.scans = 0
        self._sound = True
        self._progressive = False
        self._components: dict[int, tuple[int, int]] = {}  # id -> blocks in an MCU, DQT number
        self._unseen: set[int] = set()
        self._quantization: set[int] = set()
        self._huffman: set[int] = set()  # class (0 DC, 16 AC) + number

    @property
    def complete(self) -> bool:
        """Whether all is sound so far, and there is a scan for each of the frame's components."""
        return self._sound and bool(self._components) and not self._unseen

    def read(self, marker: int, body: bytes) -> None:
        """Take the next segment."""
        sound = True
        if 0xC0 <= marker <= 0xCF and marker not in (_DHT, 0xC8, 0xCC):
            sound = self._read_frame(marker, body)
        elif marker == _DHT:
            sound = self._read_huffman(body)
        elif marker == _DQT:
            sound = self._read_quantization(body)
        elif marker == _DRI:
            sound = len(body) == 2
        elif marker == _SOS:
            sound = self._read_scan(body)
        elif marker in _KEPT or marker in _STANDALONE:
            sound = False  # arithmetic coding, hierarchies, a height that comes later, a stray RST
        self._sound = self._sound and sound

    def _read_frame(self, marker: int, body: bytes) -> bool:
        if len(body) < 6:
            return False
        again = bool(self._components)
        self.height = int.from_bytes(body[1:3], "big")
        self.width = int.from_bytes(body[3:5], "big")
        self._progressive = marker == _PROGRESSIVE
        sound = not again and marker <= _PROGRESSIVE and body[0] == 8
        sound = sound and body[5] in (1, 3) and len(body) == 6 + 3 * body[5]
        for number, sampling, table in zip(body[6::3], body[7::3], body[8::3], strict=False):
            horizontal, vertical = sampling >> 4, sampling & 15
            sound = sound and horizontal in (1, 2, 4) and vertical in (1, 2, 4)
            self._components[number] = horizontal * vertical, table
        self._unseen = set(self._components)
        return sound and len(self._components) == body[5]

    def _read_quantization(self, body: bytes) -> bool:
        while body:
            size = 1 + (128 if body[0] & 0xF0 else 64)
            if body[0] & 0xEC or len(body) < size:
                return False
            self._quantization.add(body[0] & 3)
            body = body[size:]
        return True

    def _read_huffman(self, body: bytes) -> bool:
        while body:
            counts = body[1:17]
            size = 17 + sum(counts)
            symbols = body[17:size]
            if body[0] & 0xEC or len(body) < size or not 0 < len(symbols) <= 256:
                return False
            if body[0] < 16 and max(symbols) > 15:  # a DC difference has at most 15 bits
                return False
            code = 0
            for bits, count in enumerate(counts, 1):
                code = 2 * code + count
                if code >= 1 << bits:  # too many codes; and none may be all ones
                    return False
            self._huffman.add(body[0])
            body = body[size:]
        return True

    def _read_scan(self, body: bytes) -> bool:
        self.scans += 1
        if not body or len(body) != 4 + 2 * body[0] or body[0] not in (1, 2, 3):
            return False
        numbers, tables = body[1:-3:2], body[2:-3:2]
        if len(set(numbers)) < len(numbers) or not self._components.keys() >= set(numbers):
            return False
        self._unseen -= set(numbers)
        parts = [self._components[number] for number in numbers]
        return (
            (len(parts) == 1 or sum(blocks for blocks, _ in parts) <= 10)
            and self._quantization >= {table for _, table in parts}
            and self._is_decodable(body[-3:], tables)
        )

    def _is_decodable(self, band: bytes, tables: bytes) -> bool:
        """Check a scan's band of coefficients and bits, and its Huffman tables."""
        first, last, high, low = band[0], band[1], band[2] >> 4, band[2] & 15
        dc = {table >> 4 for table in tables}
        ac = {16 + (table & 15) for table in tables}
        if not self._progressive:
            return (first, last, high, low) == (0, 63, 0, 0) and self._huffman >= dc | ac
        if low > 13 or (high and high != low + 1):
            return False
        if first == 0:
            return last == 0 and (high > 0 or self._huffman >= dc)
        return first <= last <= 63 and len(tables) == 1 and self._huffman >= ac
