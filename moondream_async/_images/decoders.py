"""Files into Pillow images, within a budget. Loads Pillow.

One picture costs a worker at most 1 GB of memory and about ten seconds, whatever is in the
file. The cost of a pixel limits a format's pixels: most decoders take four bytes a pixel,
WebP's up to sixteen, and decoders in Python take so long that they get small pictures only.
The file's own bytes are checked before a decoder reads them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Final, cast

from PIL import Image

from moondream_async.errors import ImageError, MissingExtraError

from .formats import HEIF_INSTALL, is_heif
from .header import MAX_PIXELS, Header, check_size

# The formats of Pillow that are decoded, and the most pixels of each. Pillow decodes others in
# Python, for minutes with some headers (DDS), or by starting programs (EPS).
_PIXELS: Final = {
    **dict.fromkeys(("BMP", "DIB", "GIF", "JPEG", "PCX", "PNG", "PPM", "TGA", "TIFF"), MAX_PIXELS),
    "AVIF": 50_000_000,
    "ICNS": 1 << 20,
    "ICO": 1 << 20,
    "JPEG2000": 25_000_000,
    "WEBP": 40_000_000,
}
_PLUGIN_PIXELS: Final = 64_000_000  # of a plugin's format, as HEIC: phones have 49 million
_PYTHON_PIXELS: Final = 1 << 20  # for a decoder in Python, as of BMP's run lengths: a second
_PYTHON_BYTES: Final = 8 << 20  # of such a file; a plain PPM may be nothing but comments
_PLAIN_COMMENTS: Final = 100  # of a plain PPM; Pillow copies a megabyte for each
_ICON_BYTES: Final = 16 << 20
_SCANNED_PIXELS: Final = 3_000_000_000  # of a progressive JPEG, all scans together: seconds
_TIFF_ENTRIES: Final = 200_000  # values of one tag: a strip for each row of the tallest scan

# Put in place of a JPEG's missing data; else the decoder fills up with zeros.
_NO_END: Final = b"".join(
    (b"\xaa" * 256, *(bytes([0xFF, 0xD0 + number]) + b"\xaa" * 64 for number in range(8)))
)

# Two threads must not load the same lazily opened picture: both would move its file position.
_loading = threading.Lock()

_thread = threading.local()


class MissingDecoderError(ImageError, MissingExtraError):
    """A picture's format needs an extra, which is not installed."""


class _WhileDecoding(type):
    """The metaclass of a class whose subclasses are all warnings, in threads that decode."""

    def __subclasscheck__(cls, other: type) -> bool:
        return getattr(_thread, "decoding", False)


class _AnyWarning(Warning, metaclass=_WhileDecoding):
    """The category that `quiet` ignores: filters hold for the process, this class for a thread."""


logging.getLogger("PIL.TiffImagePlugin").addFilter(
    lambda _: not getattr(_thread, "decoding", False)
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings of decoders in this thread; none is printed, none becomes an error."""
    filters = warnings.filters
    if not filters or filters[0][2] is not _AnyWarning:
        warnings.simplefilter("ignore", _AnyWarning)
    _thread.decoding = True
    try:
        yield
    finally:
        _thread.decoding = False


def decode_file(
    data: bytes, header: Header | None, size: tuple[int, int] | None = None
) -> Image.Image:
    """Decode a file.

    Args:
        data: The whole file.
        header: The header, where the file was walked.
        size: The size that is needed: a JPEG is decoded at a half, a quarter or an eighth of
            its own size if that is not smaller.

    Raises:
        ImageError: Pillow can't read it, or it costs too much. Damaged files raise other
            exceptions of Pillow.
    """
    if header is not None:
        _check_pixels(header.media_type[6:].upper(), header.width, header.height)
        if header.scans * header.width * header.height > _SCANNED_PIXELS:
            raise ImageError(f"is too large to be opened in {header.scans} scans")
    image = _open(data)
    if image.format == "JPEG" and header and image.size != (header.width, header.height):
        raise ImageError("is damaged: a JPEG of two sizes")
    if size is not None:
        image.draft(image.mode, size)
    tiles: Any = getattr(image, "tile", ())
    box = tiles[0][1] if image.format == "GIF" and tiles else None
    load(image)
    if header is not None and header.unfinished:
        end = len(data) - 2
        other = decode_file(data[:end] + _NO_END + data[end:], None, size)
        if other.tobytes() != image.tobytes():  # the data put in are visible: some were missing
            raise ImageError("is cut short: a JPEG that ends within its picture")
    if image.format == "PNG":
        _scale_key(image, depth=data[24])
    if box is not None and box != (0, 0, *image.size):
        return _framed(image, box)
    return image


def load(image: Image.Image) -> None:
    """Decode a lazily opened picture.

    Pillow would clear the memory for the pixels under the GIL, in 40 ms for 12 megapixels.
    `Image.new` does so without it.
    """
    with _loading if getattr(image, "tile", None) else contextlib.nullcontext():
        if getattr(image, "tile", None) and image.format in ("JPEG", "PNG") and not image.tell():
            image.im = Image.new(image.mode, image.size).im
        image.load()


def _open(data: bytes) -> Image.Image:
    """Do as `Image.open`, for `_PIXELS` and the formats of plugins alone, within the budget."""
    _check_container(data)
    image = _opened_by_pillow(data)
    _check_pixels(image.format or "", *image.size)
    # Pillow registers its decoders in Python, and not those in C.
    in_python = any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))
    if in_python and (image.width * image.height > _PYTHON_PIXELS or len(data) > _PYTHON_BYTES):
        raise ImageError(f"is too large to be opened: {image.format} of a kind that takes long")
    return image


def _opened_by_pillow(data: bytes) -> Image.Image:
    file = io.BytesIO(data)
    tried: set[str] = set()
    reason: Exception | None = None
    for load_plugins in (Image.preinit, Image.init):  # the common ones, then all
        load_plugins()
        for name in Image.ID:
            if name in tried:
                continue
            tried.add(name)
            factory, accept = Image.OPEN[name]
            if name not in _PIXELS and factory.__module__.startswith("PIL."):
                continue  # neither in the list nor a plugin that the user has registered
            file.seek(0)
            try:
                # `accept` returns a string where the format is right, but can't be decoded.
                if accept is None or accept(data[:16]) is True:
                    return factory(file, "")
            except Exception as error:  # noqa: BLE001 - plugins fail in any way on other formats
                if accept is not None:
                    reason = reason or error
    if is_heif(data):
        return _heif(data)
    raise ImageError("is not a picture of a known format") from reason


def _heif(data: bytes) -> Image.Image:
    """Open a HEIC picture by `pillow-heif`, which is not registered for other users of Pillow."""
    try:
        from pillow_heif import HeifImageFile  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingDecoderError(
            f"is a HEIC picture, which needs an extra: {HEIF_INSTALL}"
        ) from error
    plugin: Any = HeifImageFile
    return cast("Image.Image", plugin(io.BytesIO(data), ""))


def _check_pixels(kind: str, width: int, height: int) -> None:
    check_size(width, height)
    limit = _PIXELS.get(kind, _PLUGIN_PIXELS)
    if width * height > limit:
        raise ImageError(
            f"is too large to be opened: {width}x{height} is more than {limit:,} pixels of {kind}"
        )


# -- checks of a file's bytes before a decoder reads them ------------------------------

_INNER_PNG: Final = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR(.{8})", re.DOTALL)
_INNER_J2K: Final = re.compile(rb"\xff\x4f\xff\x51.{4}(.{8})", re.DOTALL)
_TIFF_SIZES: Final = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _check_container(data: bytes) -> None:
    """Refuse files that Pillow can't even open within the budget."""
    if data.startswith((b"\0\0\1\0", b"\0\0\2\0", b"icns")):
        _check_icon(data)
    elif data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > _PLAIN_COMMENTS:
        raise ImageError("is no ordinary PPM: it has more comments than anybody writes")
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data)


def _check_icon(data: bytes) -> None:
    """Check the pictures within an ICO or ICNS, which Pillow decodes on opening."""
    if len(data) > _ICON_BYTES:
        raise ImageError(f"is too large to be opened: an icon of {len(data):,} bytes")
    sizes = [
        struct.unpack(">II", found[1])
        for pattern in (_INNER_PNG, _INNER_J2K)
        for found in pattern.finditer(data)
    ]
    for entry in range(6, 6 + 16 * min(data[4] + 256 * data[5], len(data) // 16), 16):
        at = int.from_bytes(data[entry + 12 : entry + 16], "little")
        # A bitmap, whose header says twice its height.
        if data[:4] != b"icns" and data[at : at + 4] == b"\x28\0\0\0":
            width, height = struct.unpack("<ii", data[at + 4 : at + 12].ljust(8, b"\0"))
            sizes.append((abs(width), abs(height) // 2))
    for width, height in sizes:
        if width * height > _PIXELS["ICO"]:
            raise ImageError(f"is too large to be opened: an icon of {width}x{height} pixels")


def _check_tiff(data: bytes) -> None:
    """Check the first directory of a TIFF; Pillow copies all its values on opening."""
    order = "<" if data[:1] == b"I" else ">"
    big = data[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQQ" if big else "HHII"))
    begin, count = struct.Struct(order + ("Q" if big else "I")), order + ("Q" if big else "H")
    total = 0
    try:
        (at,) = begin.unpack_from(data, 8 if big else 4)
        (entries,) = struct.unpack_from(count, data, at)
        at += struct.calcsize(count)
        for number in range(min(entries, 65536)):
            tag, kind, values, place = entry.unpack_from(data, at + number * entry.size)
            value = at + number * entry.size + (12 if big else 8)
            if tag == 259 and data[value : value + 2] in (b"\x51\xc3", b"\xc3\x51"):
                # libtiff can't, and would say so on stderr.
                raise ImageError("is a TIFF compressed as WebP, which few programs can read")
            size = values * _TIFF_SIZES.get(kind, 1)
            if size > begin.size and place + size <= len(data):
                total += size
                if kind not in (1, 2, 6, 7) and values > _TIFF_ENTRIES:
                    raise ImageError(f"is no ordinary TIFF: a tag has {values:,} values")
    except struct.error:
        return  # Pillow raises an error for it
    if total > len(data):
        raise ImageError("is no ordinary TIFF: its tags have more values than it has bytes")


# -- what Pillow leaves out ------------------------------------------------------------


def _scale_key(image: Image.Image, *, depth: int) -> None:
    """Scale a PNG's transparent colour as Pillow has scaled its pixels."""
    key: Any = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _framed(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return a GIF's first frame, transparent around it, where Pillow has put a colour."""
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.crop(box).convert("RGBA"), box)
    canvas.format = image.format
    return canvas
