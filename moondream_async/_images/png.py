"""PNG: cut out the metadata, keep the first picture. PNG specification, third edition.

A chunk is kept if it has the size that the specification gives it, and comes only once.
Only inflating shows where the picture's compressed data end. This is done for pictures that
may be sent as they are; it costs more than all else here (a tenth of a second for 12
megapixels), and also proves that the picture is whole.
"""

from __future__ import annotations

import binascii
import contextlib
import struct
import zlib
from collections.abc import Iterator
from typing import Final

from moondream_async.errors import ImageError

from .header import Header, check_size, exif_orientation, icc_profile, xmp_orientation

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_END: Final = b"\0\0\0\0IEND\xaeB`\x82"
_DEPTHS: Final = {  # colour type -> bits a sample may have
    0: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    4: (8, 16),
    6: (8, 16),
}
_SAMPLES: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples a pixel
_SIZES: Final = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"pHYs": 9}
_PASSES: Final = (  # of Adam7: left, top, step to the right, step down
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
_PROFILE_NAMES: Final = (b"ICC Profile", b"ICC profile", b"icc", b"Photoshop ICC profile")
_RAW_PROFILES: Final = (b"Raw profile type exif", b"Raw profile type APP1")  # ImageMagick's
_CUT_SHORT: Final = "is cut short: a PNG without an end"
_CHECKSUM: Final = "is damaged: a PNG chunk does not match its checksum"
_MAX_CHUNKS: Final = 100_000  # encoders with 8 KiB a chunk write a third of this for 256 MB
_MAX_TEXT: Final = 1 << 18  # bytes of EXIF or XMP that are searched for an orientation
_MAX_PROFILE: Final = 1 << 20  # bytes, the same limit as Pillow's; profiles have some kB
_STEP: Final = 1 << 16  # compressed bytes inflated at a time


def parse(data: bytes) -> Header:
    """Walk a PNG from its signature to IEND.

    Kept are the picture and the chunks about its colours. Text, EXIF, XMP, times, an
    animation's other frames, unknown chunks and bytes after IEND are cut out. A chunk that
    is cut out may be damaged; IEND may be missing if the picture is whole without it.

    Raises:
        ImageError: The file ends before its picture does, one of the picture's chunks is
            damaged, or it is no PNG throughout.
    """
    walk = _Walk(data)
    for kind, begin, body, end in _chunks(data):
        if (kind == b"IHDR") == bool(walk.seen):
            raise ImageError("is damaged: a PNG must begin with its one header")
        walk.take(kind, begin, body, end)
        walk.seen.add(kind)
    return walk.header()


class _Walk:
    """The state of a walk through a PNG."""

    def __init__(self, data: bytes) -> None:
        self.seen: set[bytes] = set()
        self._view = memoryview(data)
        self._kept: list[bytes | memoryview] = []
        self._start = 0  # from here to `_end` all is kept, and not yet in `_kept`
        self._end = len(SIGNATURE)
        self._cut = False
        self._width = self._height = self._depth = self._colour = 0
        self._stream: _Stream | None = None
        self._orientations: dict[bytes, int] = {}

    def take(self, kind: bytes, begin: int, body: memoryview, end: int) -> None:
        """Take the next chunk; keep the parts that are needed."""
        self._cut = end > len(self._view)
        intact = not self._cut and zlib.crc32(self._view[begin + 4 : end - 4]) == int.from_bytes(
            self._view[end - 4 : end], "big"
        )
        if kind == b"IDAT":
            kept = self._picture_data(body, intact=intact)
        elif kind in (b"IHDR", b"PLTE") and not intact:
            raise ImageError(_CUT_SHORT if self._cut else _CHECKSUM)
        elif kind == b"IHDR":
            self._read_header(body)
            kept = body
        else:
            kept = self._ancillary(kind, body) if intact else None
        if kept is not body or self._cut:
            self._kept.append(self._view[self._start : self._end])
            self._kept.append(b"" if kept is None else _chunk(kind, kept))
            self._start = end
        self._end = end

    def header(self) -> Header:
        """Return the header, once all chunks were taken; ImageError if the picture is cut."""
        if b"IHDR" not in self.seen or (self._stream is None and b"IEND" not in self.seen):
            raise ImageError(_CUT_SHORT)
        if self._stream is None or (self._colour == 3 and b"PLTE" not in self.seen):
            raise ImageError("is a PNG without a picture in it")
        if self._stream.lacks_its_end and (self._cut or b"IEND" not in self.seen):
            raise ImageError(_CUT_SHORT)
        self._kept.append(self._view[self._start : self._end])
        if bytes(self._view[self._end - len(_END) : self._end]) != _END:
            self._kept.append(_END)
        found = self._orientations
        return Header(
            media_type="image/png",
            width=self._width,
            height=self._height,
            kept=self._kept,
            plain=self._stream.whole and b"tRNS" not in self.seen,
            orientation=found.get(b"eXIf") or found.get(b"raw") or found.get(b"XMP") or 1,
        )

    def _read_header(self, body: memoryview) -> None:
        if len(body) == 13:
            width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", body)
            if depth in _DEPTHS.get(colour, ()) and methods in ([0, 0, 0], [0, 0, 1]):
                check_size(width, height)
                self._width, self._height, self._depth, self._colour = width, height, depth, colour
                self._interlaced = methods[2] == 1
                return
        raise ImageError("is damaged: a PNG header that means nothing")

    def _picture_data(self, body: memoryview, *, intact: bool) -> memoryview | bytes | None:
        """Return the part of an IDAT that belongs to the picture."""
        if self._stream is None:
            plain = self._colour in (0, 2) and self._depth <= 8 and b"tRNS" not in self.seen
            self._stream = _Stream(self._expected() if plain else None)
        if self._stream.ended:
            return None
        if not (intact or self._cut):
            raise ImageError(_CHECKSUM)
        used = self._stream.feed(body)
        return body if used == len(body) else bytes(body[:used]) or None

    def _expected(self) -> int:
        """Return how many bytes the picture has, uncompressed."""
        bits = _SAMPLES[self._colour] * self._depth
        passes = _PASSES if self._interlaced else ((0, 0, 1, 1),)
        total = 0
        for left, top, right, down in passes:
            columns = max(0, -(-(self._width - left) // right))
            rows = max(0, -(-(self._height - top) // down))
            total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
        return total

    def _ancillary(self, kind: bytes, body: memoryview) -> memoryview | bytes | None:
        """Return the part of another chunk that is kept; None for nothing."""
        if kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            self._read_orientation(kind, body)
            return None
        if kind == b"IEND":
            fits = not body
        elif kind in self.seen or b"IDAT" in self.seen:
            fits = False
        elif kind == b"iCCP":
            return _profile(body)
        elif kind == b"PLTE":  # in RGB only a suggestion for displays of few colours
            fits = self._colour == 3 and len(body) % 3 == 0 and 3 <= len(body) <= 3 << self._depth
        elif kind == b"tRNS":
            fits = len(body) in {0: (2,), 2: (6,), 3: range(1, 257)}.get(self._colour, ())
        elif kind == b"sBIT":
            fits = len(body) == (3 if self._colour == 3 else _SAMPLES[self._colour])
        else:
            fits = len(body) == _SIZES.get(kind)
        return body if fits else None

    def _read_orientation(self, kind: bytes, body: memoryview) -> None:
        if kind == b"eXIf":
            self._orientations[kind] = exif_orientation(body)
            return
        keyword, _, rest = bytes(body[: _MAX_TEXT * 2]).partition(b"\0")
        if keyword == b"XML:com.adobe.xmp" and kind == b"iTXt":
            self._orientations[b"XMP"] = xmp_orientation(_text(kind, rest))
        elif keyword in _RAW_PROFILES:
            with contextlib.suppress(binascii.Error):
                # A line with the name, a line with the size, then hexadecimal digits.
                profile = b"".join(_text(kind, rest).split()[2:])[:131072]
                exif = binascii.unhexlify(profile[: len(profile) // 2 * 2])
                self._orientations[b"raw"] = exif_orientation(exif) or xmp_orientation(exif)


class _Stream:
    """The picture's compressed data, inflated to find their end."""

    def __init__(self, expected: int | None) -> None:
        """Inflate data of `expected` uncompressed bytes; None inflates nothing."""
        self.ended = False
        self.whole = False
        """Whether the data are well formed, and exactly as many as expected."""
        self._inflater = None if expected is None else zlib.decompressobj()
        self._missing = expected or 0

    @property
    def lacks_its_end(self) -> bool:
        """Whether the data were inflated, and have not ended."""
        return self._inflater is not None and not self.ended

    def feed(self, body: memoryview) -> int:
        """Take the next bytes; return how many of them belong to the data."""
        if self._inflater is None:
            return len(body)
        try:
            for at in range(0, len(body), _STEP):
                piece: memoryview | bytes = body[at : at + _STEP]
                while piece and not self._inflater.eof:
                    self._missing -= len(self._inflater.decompress(piece, 1 << 20))
                    if self._missing < 0:  # more than the picture: inflated no further
                        self.ended = True
                        return len(body)
                    piece = self._inflater.unconsumed_tail
                if self._inflater.eof:
                    self.ended = True
                    self.whole = self._missing == 0
                    return min(at + _STEP, len(body)) - len(self._inflater.unused_data)
        except zlib.error:
            self._inflater = None  # Pillow decides whether the damaged picture can be shown
        return len(body)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, memoryview, int]]:
    """Yield name, beginning, body and end of all chunks, up to and with IEND.

    A last chunk that is cut short has an end beyond the data's.
    """
    view = memoryview(data)
    at = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return
        begin = at
        size, kind = struct.unpack_from(">I4s", data, begin)
        at += 12 + size
        yield kind, begin, view[begin + 8 : at - 4], at
        if kind == b"IEND":
            return
    raise ImageError(f"is no ordinary PNG: it has more than {_MAX_CHUNKS:,} chunks")


def _chunk(kind: bytes, body: bytes | memoryview) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(kind))
    return b"".join((len(body).to_bytes(4, "big"), kind, body, checksum.to_bytes(4, "big")))


def _profile(body: memoryview) -> memoryview | bytes | None:
    """Return iCCP with a clean profile, and without its name, which may be any text."""
    name, _, rest = bytes(body).partition(b"\0")
    inflater = zlib.decompressobj()
    try:
        given = inflater.decompress(rest[1:], _MAX_PROFILE)
    except zlib.error:
        return None
    profile = icc_profile(given)
    if profile is None or not inflater.eof or rest[:1] != b"\0":
        return None
    if name in _PROFILE_NAMES and profile == given and not inflater.unused_data:
        return body
    return _PROFILE_NAMES[0] + b"\0\0" + zlib.compress(profile)


def _text(kind: bytes, rest: bytes) -> bytes:
    """Return the beginning of a chunk's text; `rest` follows the chunk's keyword."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        rest = rest[1:]
    if not packed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, 2 * _MAX_TEXT)
    except zlib.error:
        return b""
