"""PNG: cut out the metadata, keep the first picture. PNG specification, third edition.

Chunks are checked by their CRC, so that a damaged file is told from a whole one
without being decompressed.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Final

from moondream_async.errors import ImageError

from .header import Header, exif_orientation

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"

_KEPT: Final = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS"}  # the picture
    | {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"sBIT", b"pHYs"}  # how it is to be shown
)
_DEPTHS: Final = {  # colour type -> bits a sample may have
    0: (1, 2, 4, 8, 16),
    2: (8, 16),
    3: (1, 2, 4, 8),
    4: (8, 16),
    6: (8, 16),
}
_CUT_SHORT: Final = "is cut short: a PNG without an end"
_MAX_CHUNKS: Final = 100_000  # encoders that write 8 KiB a chunk need a third of it for 256 MB


def parse(data: bytes) -> Header:
    """Walk a PNG from its signature to IEND.

    Kept are the picture and what tells its colours. Text, EXIF, XMP, times, an
    animation's other frames, unknown chunks and what follows IEND go.

    Raises:
        ImageError: It ends before its picture does, a chunk is damaged, or it is
            no PNG throughout.
    """
    view = memoryview(data)
    kept: list[bytes | memoryview] = []
    start = end = 0  # what lies between is kept and not yet in `kept`
    width = height = depth = colour = 0
    orientation = 1
    seen: set[bytes] = set()
    for kind, begin, body, end in _chunks(data):
        if (kind == b"IHDR") == bool(seen):
            raise ImageError("is damaged: a PNG must begin with its one header")
        seen.add(kind)
        if kind == b"IHDR":
            width, height, depth, colour = _read_header(body)
        elif kind == b"eXIf":
            orientation = exif_orientation(body)
        if kind not in _KEPT:
            kept.append(view[start:begin])
            start = end
    kept.append(view[start:end])
    if b"IDAT" not in seen or (colour == 3 and b"PLTE" not in seen):
        raise ImageError("is a PNG without a picture in it")
    return Header(
        media_type="image/png",
        width=width,
        height=height,
        kept=kept,
        plain=colour in (0, 2) and depth <= 8 and b"tRNS" not in seen,
        orientation=orientation,
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, memoryview, int]]:
    """Yield name, beginning, body and end of all chunks, up to and with IEND."""
    view = memoryview(data)
    at = len(SIGNATURE)
    for _ in range(_MAX_CHUNKS):
        if at + 12 > len(data):
            raise ImageError(_CUT_SHORT)
        begin = at
        size, kind = struct.unpack_from(">I4s", data, begin)
        at += 12 + size
        if at > len(data):
            raise ImageError(_CUT_SHORT)
        if zlib.crc32(view[begin + 4 : at - 4]) != int.from_bytes(view[at - 4 : at], "big"):
            raise ImageError("is damaged: a PNG chunk does not match its checksum")
        yield kind, begin, view[begin + 8 : at - 4], at
        if kind == b"IEND":
            return
    raise ImageError(f"is no ordinary PNG: it has more than {_MAX_CHUNKS:,} chunks")


def _read_header(body: memoryview) -> tuple[int, int, int, int]:
    """Return width, height, bits a sample and colour type."""
    if len(body) == 13:
        width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", body)
        if depth in _DEPTHS.get(colour, ()) and methods in ([0, 0, 0], [0, 0, 1]):
            return width, height, depth, colour
    raise ImageError("is damaged: a PNG header that means nothing")
