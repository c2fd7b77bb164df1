"""The header of a picture's file, read without decoding.

`jpeg`, `png`, `gif` and `webp` each walk their format from the first byte to the end of the
first picture and return a `Header`. Each keeps only the parts that it knows to be needed to
draw the picture, so that unknown kinds of metadata are cut out, too. A file that ends before
its picture does is an `ImageError` already here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from moondream_async.errors import ImageError

MAX_PIXELS: Final = 89_478_485
"""Larger pictures are refused; Pillow warns of a decompression bomb above the same limit.

At four bytes a pixel this takes 358 MB, and is fifty times as much as the model looks at.
"""

MAX_SIDE: Final = 1_000_000
"""Pictures with a longer side are refused: a decoder needs up to 16 bytes for each row."""


class Header(NamedTuple):
    """A picture's size, orientation and kind, and the parts of its file that are kept."""

    media_type: str
    width: int
    height: int
    kept: list[bytes | memoryview]
    """The pieces of the file without metadata and without what follows the first picture."""
    plain: bool
    """Whether all servers show the file alike: it has no alpha, palette or 16 bits."""
    orientation: int = 1
    """As in EXIF: 1 is upright, 2-8 are mirrored and turned."""
    shortened: Callable[[], bytes] | None = None
    """Returns the picture without the last bytes of its compressed data. If this can be decoded,
    those bytes were hidden behind the picture. None where the walk itself finds such bytes."""
    scans: int = 1
    """How often a decoder goes over the whole picture."""
    unfinished: bool = False
    """Whether the end mark is missing; only decoding shows whether the picture is whole."""

    def cleaned(self, data: bytes) -> bytes:
        """Return `data` as it will be sent; the same object if nothing was cut out."""
        if sum(map(len, self.kept)) == len(data) and all(
            isinstance(piece, memoryview) or not piece for piece in self.kept
        ):
            return data
        return b"".join(self.kept)


def check_size(width: int, height: int) -> None:
    """Raise `ImageError` for a picture without pixels, or over `MAX_PIXELS` or `MAX_SIDE`."""
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"is too large to be opened: {width}x{height} is more than {MAX_PIXELS:,} pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"is too large to be opened: {width}x{height} has a side over {MAX_SIDE:,} pixels"
        )


def exif_orientation(exif: bytes | memoryview) -> int:
    r"""Return the orientation, 1-8, of an EXIF block; 0 if it is damaged or has none.

    >>> one_entry = b"\0\x01" + b"\x01\x12" + b"\0\x03" + b"\0\0\0\x01" + b"\0\x06\0\0"
    >>> exif_orientation(b"Exif\0\0MM\0*\0\0\0\x08" + one_entry)
    6
    >>> exif_orientation(b"MM\0*")
    0
    """
    tiff = bytes(exif[:65536]).removeprefix(b"Exif\0\0")  # one APP1 segment holds no more
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 0
    try:
        (ifd,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, ifd)
        for at in range(ifd + 2, ifd + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x0112:  # Orientation, written as LONG (4) by some programs, not SHORT (3)
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 0


_XMP_ORIENTATION: Final = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)\s*([1-8])\b""")


def xmp_orientation(xmp: bytes) -> int:
    """Return the orientation, 1-8, of XMP; 0 if it has none.

    >>> xmp_orientation(b"<tiff:Orientation>6</tiff:Orientation>")
    6
    """
    found = _XMP_ORIENTATION.search(xmp[: 1 << 18])
    return int(found[1]) if found else 0


def icc_profile(data: bytes) -> bytes | None:
    """Return an ICC profile reduced to its header and tags; None if it is no profile.

    Bytes after it are cut off; reserved ones, and those between its tags, become zero.
    """
    size, count = int.from_bytes(data[:4], "big"), int.from_bytes(data[128:132], "big")
    if size > len(data) or data[36:40] != b"acsp" or count > 1000:
        return None
    clean = bytearray(size)
    end = 132 + 12 * count
    clean[:100], clean[128:end] = data[:100], data[128:end]
    for at in range(132, end, 12):
        begin, length = struct.unpack(">II", data[at + 4 : at + 12].ljust(8, b"\0"))
        if begin + length > size:
            return None
        clean[begin : begin + length] = data[begin : begin + length]
        end = max(end, begin + length)
    end = min(size, -(-end // 4) * 4)  # tags are filled up to four bytes
    clean[:4] = end.to_bytes(4, "big")
    return bytes(clean[:end])
