"""JPEG: cut out the metadata, and tell whether it is an ordinary one. ITU-T T.81, Annex B.

Only ordinary files are plain: 8 bits, Huffman coded, grey or three colours, every table well
formed and defined before it is used. Every decoder opens such a file, so it is sent untried.
Other files may be legal, but are rare; they are decoded.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from moondream_async.errors import ImageError

from .header import Header, exif_orientation, icc_profile, xmp_orientation

_DHT, _SOI, _EOI, _SOS, _DQT, _DNL, _DRI = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_KEPT: Final = frozenset(range(0xC0, 0xD0)) | {_SOS, _DQT, _DNL, _DRI}  # frames, tables, scans
_STANDALONE: Final = frozenset(range(0xD0, 0xD9)) | {0x01}  # RST, SOI, TEM: no length follows
_PROFILE: Final = b"ICC_PROFILE\0"
_XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"

_MARKER: Final = re.compile(rb"\xff{1,64}([\x01-\xfe])")  # with fill bytes, as T.81 allows
# Decoders skip other bytes between two segments, up to the next of these.
_NEXT_MARKER: Final = re.compile(rb"\xff[\xc0-\xfe]")
# In entropy-coded data an FF is followed by 00 (it was data), by a restart
# marker, by another FF (fill), or the data is over.
_END_OF_SCAN: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_WINDOW: Final = 1 << 20  # bytes for one call of `re`, which holds the GIL: under a millisecond

_CUT_SHORT: Final = "is cut short: a JPEG without an end"
_MAX_SCANS: Final = 100  # encoders write about ten; each costs a decoder one more pass
_MAX_SEGMENTS: Final = 10_000  # an ICC profile has at most 255, a scan three


class _Segment(NamedTuple):
    marker: int
    begin: int
    body: bytes
    """The body; for a scan, its header alone."""
    end: int
    """The end; for a scan, the end of its entropy-coded data."""
    short: bool = False
    """Whether the length is less than the two bytes of the length itself; there is no body."""


def parse(data: bytes) -> Header:
    """Walk a JPEG from its beginning to the first end-of-image marker.

    Kept are tables, frame and scans, JFIF without its thumbnail, Adobe's colour transform,
    ICC profiles. All else is cut out: EXIF, XMP, IPTC, comments, further pictures, and bytes
    after the end. With stray bytes between two segments, which are cut out, too, the picture
    is not plain.

    Raises:
        ImageError: The file ends before its picture does, or is no JPEG throughout.
    """
    walk = _Walk(data)
    for segment in _segments(data):
        walk.take(segment)
    return walk.header()


class _Walk:
    """The state of a walk through a JPEG."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._kept: list[bytes | memoryview] = []
        self._start, self._end = 0, 2  # all between is kept, and not yet in `_kept`
        self._frame = _Frame()
        self._profile = _ProfileSegments()
        self._seen: set[int] = set()
        self._last = _SOI
        self._exif = self._xmp = 0

    def take(self, segment: _Segment) -> None:
        """Take the next segment; keep the parts that are needed."""
        marker, begin, body, end, short = segment
        if begin > self._end or short:
            self._frame.damage()
        if marker == _APP2 and body.startswith(_PROFILE):
            self._replace(begin, end)
            self._profile.take(self._kept, self._view[begin:end], body[len(_PROFILE) :])
        else:
            replacement = b"" if short else _replacement(marker, body, self._seen)
            if replacement is not None:
                self._replace(begin, end, replacement)
            elif begin > self._end:
                self._replace(begin, begin)
            if replacement != b"":
                self._seen.add(marker)
        self._end = end
        self._last = marker
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            self._exif = self._exif or exif_orientation(body)
        elif marker == _APP1 and body.startswith(_XMP):
            self._xmp = self._xmp or xmp_orientation(body)
        self._frame.read(marker, body)

    def _replace(self, begin: int, end: int, replacement: bytes = b"") -> None:
        """Put `replacement` in place of the bytes from `begin` to `end`."""
        self._kept += (self._view[self._start : min(begin, self._end)], replacement)
        self._start = end

    def header(self) -> Header:
        """Return the header, once all segments were taken; ImageError if the picture is cut."""
        frame = self._frame
        unfinished = self._last != _EOI
        if unfinished and not (self._last == _SOS and frame.could_be_whole):
            raise ImageError(_CUT_SHORT)
        if not frame.scans:
            raise ImageError("is a JPEG without a picture in it")
        if frame.scans > _MAX_SCANS:
            raise ImageError(f"is no ordinary JPEG: it has {frame.scans} scans")
        end: memoryview | bytes = self._view[self._start : self._end]
        self._kept += (bytes(end).rstrip(b"\xff"), b"\xff\xd9") if unfinished else (end,)
        self._profile.settle(self._kept)
        return Header(
            media_type="image/jpeg",
            width=frame.width,
            height=frame.height,
            kept=self._kept,
            plain=frame.complete and not unfinished,
            orientation=self._exif or self._xmp or 1,
            unfinished=unfinished,
            scans=frame.scans if frame.progressive else 1,
        )


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield all segments after SOI, up to and with EOI, or to the end of the last scan."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if at >= len(data):
            return
        found = _MARKER.match(data, at)
        if found is None:
            at = _find(_NEXT_MARKER, data, at)
            found = _MARKER.match(data, at)
            if found is None:
                raise ImageError(_CUT_SHORT)
        begin, after = at, found.end()
        marker = data[after - 1]
        if marker == _EOI or marker in _STANDALONE:
            yield _Segment(marker, begin, b"", after)
            if marker == _EOI:
                return
            at = after
            continue
        if after + 2 > len(data):
            raise ImageError(_CUT_SHORT)
        size = data[after] << 8 | data[after + 1]
        at = after + max(size, 2)
        if at > len(data):
            raise ImageError(_CUT_SHORT)
        body = data[after + 2 : at]
        if marker == _SOS:
            at = _find(_END_OF_SCAN, data, at)
        yield _Segment(marker, begin, body, at, short=size < 2)
    raise ImageError(f"is no ordinary JPEG: it has more than {_MAX_SEGMENTS:,} segments")


def _replacement(marker: int, body: bytes, seen: set[int]) -> bytes | None:
    """Return what replaces a segment; None keeps it as it is, no bytes drop it."""
    if marker in _KEPT or marker == _EOI:
        return None
    if marker in seen:
        return b""
    if marker == _APP0 and body.startswith(b"JFIF\0") and len(body) >= 14:
        if len(body) == 14 and body.endswith(b"\0\0"):
            return None
        return b"\xff\xe0\x00\x10" + body[:12] + b"\0\0"  # with a thumbnail of 0 by 0
    if marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12:
        return None if len(body) == 12 else b"\xff\xee\x00\x0e" + body[:12]
    return b""


class _ProfileSegments:
    """The segments of an ICC profile, and their places in the list of kept pieces."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._parts: list[bytes] = []

    def take(self, kept: list[bytes | memoryview], whole: memoryview, body: bytes) -> None:
        """Take the next segment; `body` follows the name in it."""
        self._places.append(len(kept))
        self._parts.append(body)
        kept.append(whole)

    def settle(self, kept: list[bytes | memoryview]) -> None:
        """Put the cleaned profile into `kept`, or nothing if the profile is not whole."""
        count = len(self._parts)
        numbers = [(part[0], part[1]) for part in self._parts if len(part) > 1]
        given = b"".join(part[2:] for part in sorted(self._parts))
        profile = icc_profile(given)
        whole = sorted(numbers) == [(number, count) for number in range(1, count + 1)]
        if profile is not None and whole and profile == given:
            return
        for place in self._places:
            kept[place] = b""
        if profile is None or not whole:
            return
        pieces = [profile[at : at + 65_000] for at in range(0, len(profile), 65_000)]
        kept[self._places[0]] = b"".join(
            b"\xff\xe2%b" % (len(piece) + 16).to_bytes(2, "big")
            + _PROFILE
            + bytes([number, len(pieces)])
            + piece
            for number, piece in enumerate(pieces, 1)
        )


def _find(pattern: re.Pattern[bytes], data: bytes, at: int) -> int:
    """Return the start of the next match of `pattern`, or the end of the data."""
    while at < len(data):
        found = pattern.search(data, at, at + _WINDOW)
        if found:
            return found.start()
        at += _WINDOW - 1  # a marker may lie across the edge
    return len(data)


class _Frame:
    """The tables, frame header and scan headers of a JPEG, and whether they are sound.

    Unsound is all that libjpeg refuses, and a little more.
    """

    def __init__(self) -> None:
        self.width = self.height = self.scans = 0
        self.progressive = False
        self._sound = True
        self._components: dict[int, tuple[int, int]] = {}  # id -> blocks in an MCU, DQT number
        self._unseen: set[int] = set()
        self._tables: set[int] = set()  # by the numbers of `_tables_of`
        self._unused: set[int] = set()  # the tables that no scan has used yet
        self._missing: dict[int, list[int]] = {}  # id -> bits of each coefficient still to come

    @property
    def complete(self) -> bool:
        """Whether all is sound so far, and each of the frame's components has a scan."""
        return self._sound and self._all_seen

    @property
    def could_be_whole(self) -> bool:
        """Whether all scans that the picture needs have begun."""
        bits = itertools.chain.from_iterable(self._missing.values())
        return self._all_seen and not (self.progressive and any(bits))

    @property
    def _all_seen(self) -> bool:
        return bool(self._components) and not self._unseen

    def damage(self) -> None:
        """Mark the picture as unsound."""
        self._sound = False

    def read(self, marker: int, body: bytes) -> None:
        """Take the next segment."""
        sound = True
        if 0xC0 <= marker <= 0xCF and marker not in (_DHT, 0xC8, 0xCC):
            sound = self._read_frame(marker, body)
        elif marker in (_DHT, _DQT):
            sound = self._define(_tables_of(marker, body))
        elif marker == _DRI:
            sound = len(body) == 2
        elif marker == _SOS:
            sound = self._read_scan(body)
        elif marker in _KEPT or marker in _STANDALONE:
            sound = False  # arithmetic coding, hierarchies, a late height, a stray RST
        self._sound = self._sound and sound

    def _read_frame(self, marker: int, body: bytes) -> bool:
        if len(body) < 6:
            return False
        again = bool(self._components)
        self.height = int.from_bytes(body[1:3], "big")
        self.width = int.from_bytes(body[3:5], "big")
        self.progressive = marker == _PROGRESSIVE
        sound = not again and marker <= _PROGRESSIVE and body[0] == 8
        sound = sound and body[5] in (1, 3) and len(body) == 6 + 3 * body[5]
        for number, sampling, table in zip(body[6::3], body[7::3], body[8::3], strict=False):
            horizontal, vertical = sampling >> 4, sampling & 15
            sound = sound and horizontal in (1, 2, 4) and vertical in (1, 2, 4)
            self._components[number] = horizontal * vertical, table
            self._missing[number] = [1] * 64
        self._unseen = set(self._components)
        return sound and len(self._components) == body[5]

    def _define(self, tables: tuple[int, ...] | None) -> bool:
        """Note tables; return whether they are sound, and replace no table that was not used.

        Tables that no scan uses could hide any data.
        """
        if tables is None:
            return False
        new = self._unused.isdisjoint(tables) and len(set(tables)) == len(tables)
        self._tables.update(tables)
        self._unused.update(tables)
        return new

    def _read_scan(self, body: bytes) -> bool:
        self.scans += 1
        if not body or len(body) != 4 + 2 * body[0] or body[0] not in (1, 2, 3):
            return False
        numbers, tables = body[1:-3:2], body[2:-3:2]
        if len(set(numbers)) < len(numbers) or not self._components.keys() >= set(numbers):
            return False
        self._unseen -= set(numbers)
        parts = [self._components[number] for number in numbers]
        quantization = {_QUANTIZATION + table for _, table in parts}
        dc, ac = {table >> 4 for table in tables}, {_AC + (table & 15) for table in tables}
        self._unused -= quantization | dc | ac
        if self.progressive:
            for number in numbers:
                for coefficient in range(body[-3], min(body[-2], 63) + 1):
                    self._missing[number][coefficient] = body[-1] & 15
        return (
            (len(parts) == 1 or sum(blocks for blocks, _ in parts) <= 10)
            and self._tables >= quantization
            and self._is_decodable(body[-3:], dc, ac, len(parts))
        )

    def _is_decodable(self, band: bytes, dc: set[int], ac: set[int], components: int) -> bool:
        """Check a scan's band of coefficients and bits, and its Huffman tables."""
        first, last, high, low = band[0], band[1], band[2] >> 4, band[2] & 15
        if not self.progressive:
            return (first, last, high, low) == (0, 63, 0, 0) and self._tables >= dc | ac
        if low > 13 or (high and high != low + 1):
            return False
        if first == 0:
            return last == 0 and (high > 0 or self._tables >= dc)
        return first <= last <= 63 and components == 1 and self._tables >= ac


_AC, _QUANTIZATION = 16, 32  # added to the numbers of such tables; DC tables keep their numbers


@functools.lru_cache(maxsize=32)  # of 64 KiB at most; most programs write the same tables
def _tables_of(marker: int, body: bytes) -> tuple[int, ...] | None:
    """Return the numbers of the tables in a segment; None if one of them is not sound."""
    tables: list[int] = []
    while body:
        size = _huffman_size(body) if marker == _DHT else _quantization_size(body)
        if not 0 < size <= len(body):
            return None
        tables.append(body[0] if marker == _DHT else _QUANTIZATION + (body[0] & 3))
        body = body[size:]
    return tuple(tables)


def _quantization_size(body: bytes) -> int:
    """Return the length of the first table in bytes; 0 if it is not sound."""
    if body[0] & 0xEC:
        return 0
    return 1 + (128 if body[0] & 0xF0 else 64)


def _huffman_size(body: bytes) -> int:
    """Return the length of the first table in bytes; 0 if it is not sound."""
    counts = body[1:17]
    size = 17 + sum(counts)
    symbols = body[17:size]
    if body[0] & 0xEC or len(body) < size or not 0 < len(symbols) <= 256:
        return 0
    if body[0] < _AC and max(symbols) > 15:  # a DC difference has at most 15 bits
        return 0
    code = 0
    for bits, count in enumerate(counts, 1):
        code = 2 * code + count
        if code >= 1 << bits:  # too many codes; a code of ones alone is not allowed
            return 0
    return size
