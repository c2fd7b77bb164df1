"""GIF: keep the first picture and nothing else. GIF89a specification."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from moondream_async.errors import ImageError

from .header import Header

_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_GRAPHIC_CONTROL: Final = 0xF9
_TAIL: Final = 8  # bytes taken away; decoders do without the last two or three
_MAX_BLOCKS: Final = 1_000_000  # of 255 bytes each, enough for 256 MB


def parse(data: bytes) -> Header:
    """Walk a GIF to the end of its first picture; what follows is not read.

    Kept are the header, the palettes, the first picture and its graphic control. Comments,
    application data (also XMP and ICC) and the other frames are cut out. Only a decoder can
    find bytes that hide behind the picture's own.

    The GIF is plain when the first picture covers the whole canvas and has no transparent
    colour. Its palette does not count: all servers that take GIF read palettes.

    Raises:
        ImageError: The file ends before its first picture does, or is no GIF throughout.
    """
    view = memoryview(data)
    try:
        width, height, packed = struct.unpack_from("<HHB", data, 6)
        head = at = 13 + _palette_size(packed)
        control: memoryview | None = None
        budget = iter(range(_MAX_BLOCKS))
        while data[at] == _EXTENSION:
            begun = at
            at = _after_blocks(data, at + 2, budget)
            if data[begun + 1] == _GRAPHIC_CONTROL:
                control = view[begun:at]
        if data[at] != _IMAGE:
            raise ImageError("is a GIF without a picture in it")
        begun = at
        left, top, inner_width, inner_height, packed = struct.unpack_from("<HHHHB", data, at + 1)
        codes = at + 11 + _palette_size(packed)  # after the byte with the size of the first codes
        at = _after_blocks(data, codes, budget)
    except (IndexError, struct.error) as error:
        raise ImageError("is cut short: a GIF that ends within its first picture") from error
    if control is not None and len(control) != 8:
        raise ImageError("is damaged: a GIF with a malformed graphic control")
    whole = (left, top, inner_width, inner_height) == (0, 0, width, height)
    transparent = control is not None and control[3] & 1
    kept = [view[:head], control or b"", view[begun:at], bytes([_TRAILER])]
    if at == head + len(control or b"") + len(view[begun:at]) and data[at:] == b"\x3b":
        kept = [view]  # nothing to cut
    return Header(
        media_type="image/gif",
        width=width,
        height=height,
        kept=kept,
        plain=whole and not transparent,
        shortened=lambda: b"".join(
            (view[:head], view[begun:codes], _shortened(view[codes:at]), bytes([_TRAILER]))
        ),
    )


def _shortened(blocks: memoryview) -> bytes:
    """Return data blocks without their last bytes."""
    data = bytearray()
    at = 0
    while size := blocks[at]:
        data += blocks[at + 1 : at + 1 + size]
        at += 1 + size
    del data[-_TAIL:]
    pieces = (data[at : at + 255] for at in range(0, len(data), 255))
    return b"".join(bytes([len(piece)]) + piece for piece in pieces) + b"\0"


def _palette_size(packed: int) -> int:
    """Return the bytes of a palette, from the last byte of its descriptor."""
    return 3 << ((packed & 7) + 1) if packed & 0x80 else 0


def _after_blocks(data: bytes, at: int, budget: Iterator[int]) -> int:
    """Return the position after the data blocks at `at`; an empty block is the last one."""
    for _ in budget:
        size = data[at]
        at += 1 + size
        if not size:
            return at
    raise ImageError(f"is no ordinary GIF: it has more than {_MAX_BLOCKS:,} blocks")
