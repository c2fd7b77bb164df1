"""What a file's own bytes say about the picture in it, read without decoding.

`jpeg`, `png`, `gif` and `webp` each walk their format from the first byte to the
end of the first picture and return a `Header`. Each lists what is needed to draw
the picture, and keeps only that: metadata of a kind that nobody thought of is cut
out too. A file that ends before its picture does is an `ImageError` already here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from moondream_async.errors import ImageError

MAX_PIXELS = 89_478_485
"""Larger pictures are refused: Pillow's own line, from where it warns of a decompression bomb.

256 MiB at three bytes a pixel; a picture of that size is some fifty times what
the model looks at.
"""


class Header(NamedTuple):
    """A picture's measures, and where in the file it is."""

    media_type: str
    width: int
    height: int
    kept: list[bytes | memoryview]
    """The file without its metadata and without what follows the first picture, in pieces."""
    plain: bool
    """Whether every server can be trusted to show it as it is: no alpha, palette or 16 bits."""
    orientation: int = 1
    """EXIF's: 1 is upright, 2-8 are mirrored and turned."""

    def cleaned(self, data: bytes) -> bytes:
        """Return `data` as it will be sent; the same object if nothing had to be cut out."""
        if sum(map(len, self.kept)) == len(data) and all(
            isinstance(piece, memoryview) for piece in self.kept
        ):
            return data
        return b"".join(self.kept)


def check_size(width: int, height: int) -> None:
    """Raise `ImageError` for a picture without pixels or with more than `MAX_PIXELS`."""
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"is too large to be opened: {width}x{height} is more than {MAX_PIXELS:,} pixels"
        )


def exif_orientation(exif: bytes | memoryview) -> int:
    r"""Return the orientation, 1-8, that an EXIF block asks for; 1 if it is damaged or silent.

    >>> one_entry = b"\0\x01" + b"\x01\x12" + b"\0\x03" + b"\0\0\0\x01" + b"\0\x06\0\0"
    >>> exif_orientation(b"Exif\0\0MM\0*\0\0\0\x08" + one_entry)
    6
    >>> exif_orientation(b"MM\0*")
    1
    """
    tiff = bytes(exif[:65536]).removeprefix(b"Exif\0\0")  # one APP1 segment holds no more
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (ifd,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, ifd)
        for at in range(ifd + 2, ifd + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x0112:  # Orientation, which some write as LONG (4) instead of SHORT (3)
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
