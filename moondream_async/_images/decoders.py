"""Files into Pillow images, within a budget. Loads Pillow.

One picture costs a worker at most 1 GB of memory and about ten seconds, whatever is in
the file. What a decoder needs for a pixel says how many a picture may have: four bytes
with most, up to sixteen with WebP's, and seconds with those that are written in Python,
which is why they get small pictures only. What can be told from the file's own bytes is
told before a decoder sees them.
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

# Of Pillow's formats, those that pictures come in, and how many pixels they may have. The others
# are decoded in Python, for minutes if the header says so (DDS), or by programs that would be
# started (EPS).
_PIXELS: Final = {
    **dict.fromkeys(("BMP", "DIB", "GIF", "JPEG", "PCX", "PNG", "PPM", "TGA", "TIFF"), MAX_PIXELS),
    "AVIF": 50_000_000,
    "ICNS": 1 << 20,
    "ICO": 1 << 20,
    "JPEG2000": 25_000_000,
    "WEBP": 40_000_000,
}
_PLUGIN_PIXELS: Final = (
    64_000_000  # of a format that a plugin adds, as HEIC: phones have 49 million
)
_PYTHON_PIXELS: Final = 1 << 20  # of what is decoded in Python, as BMP's run lengths: a second
_PYTHON_BYTES: Final = 8 << 20  # of such a file, which may be comments only, as a plain PPM
_PLAIN_COMMENTS: Final = 100  # of a plain PPM; each of them has Pillow copy a megabyte
_ICON_BYTES: Final = 16 << 20
_SCANNED_PIXELS: Final = 3_000_000_000  # of a progressive JPEG, all scans together: seconds
_TIFF_ENTRIES: Final = 200_000  # values of one tag: a strip for each row of the tallest scan

# A JPEG decoder that lacks data takes these for them; without them, it goes on with zeros.
_NO_END: Final = b"".join(
    (b"\xaa" * 256, *(bytes([0xFF, 0xD0 + number]) + b"\xaa" * 64 for number in range(8)))
)

# Two threads must not load the same lazily opened picture: both would move its file.
_loading = threading.Lock()

_thread = threading.local()


class MissingDecoderError(ImageError, MissingExtraError):
    """A picture is of a kind that needs an extra, which is not installed."""


class _WhileDecoding(type):
    """The kind of a class that all warnings are of, in threads that are decoding."""

    def __subclasscheck__(cls, other: type) -> bool:
        return getattr(_thread, "decoding", False)


class _AnyWarning(Warning, metaclass=_WhileDecoding):
    """What `quiet` has ignored: filters are the whole process's, but this one is not."""


logging.getLogger("PIL.TiffImagePlugin").addFilter(
    lambda _: not getattr(_thread, "decoding", False)
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep decoders' warnings from the user's stderr, and from becoming errors; in this thread."""
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
        data: All of it.
        header: What was read of it already.
        size: What is enough: a JPEG is decoded at a half, a quarter or an eighth of
            its size if that is no less.

    Raises:
        ImageError: It is nothing that Pillow can read, or costs too much. Pillow
            raises other exceptions for what is damaged.
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
        if other.tobytes() != image.tobytes():  # what came instead of missing data shows
            raise ImageError("is cut short: a JPEG that ends within its picture")
    if image.format == "PNG":
        _scale_key(image, depth=data[24])
    if box is not None and box != (0, 0, *image.size):
        return _framed(image, box)
    return image


def load(image: Image.Image) -> None:
    """Decode a lazily opened picture.

    Pillow would clear the memory for the pixels under the GIL, which was seen to
    take 40 ms for 12 megapixels. `Image.new` does it without.
    """
    with _loading if getattr(image, "tile", None) else contextlib.nullcontext():
        if getattr(image, "tile", None) and image.format in ("JPEG", "PNG") and not image.tell():
            image.im = Image.new(image.mode, image.size).im
        image.load()


def _open(data: bytes) -> Image.Image:
    """Do what `Image.open` does, for `_PIXELS` and the formats of plugins, within the budget."""
    _check_container(data)
    image = _opened_by_pillow(data)
    _check_pixels(image.format or "", *image.size)
    # Decoders that Pillow has in Python are registered, and decoders in C are not.
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
                continue  # not what somebody registered on purpose, as HEIC
            file.seek(0)
            try:
                # A string is the reason why the plugin can't, though the format is its own.
                if accept is None or accept(data[:16]) is True:
                    return factory(file, "")
            except Exception as error:  # noqa: BLE001 - plugins fail in any way on what is not theirs
                if accept is not None:
                    reason = reason or error
    if is_heif(data):
        return _heif(data)
    raise ImageError("is not a picture of a known format") from reason


def _heif(data: bytes) -> Image.Image:
    """Open a HEIC picture by `pillow-heif`, unregistered: other users of Pillow see none of it."""
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


# -- what is told before a decoder sees it ---------------------------------------------

_INNER_PNG: Final = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR(.{8})", re.DOTALL)
_INNER_J2K: Final = re.compile(rb"\xff\x4f\xff\x51.{4}(.{8})", re.DOTALL)
_TIFF_SIZES: Final = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _check_container(data: bytes) -> None:
    """Refuse what costs too much already when Pillow opens it."""
    if data.startswith((b"\0\0\1\0", b"\0\0\2\0", b"icns")):
        _check_icon(data)
    elif data[:2] in (b"P1", b"P2", b"P3") and data.count(b"#") > _PLAIN_COMMENTS:
        raise ImageError("is no ordinary PPM: it has more comments than anybody writes")
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data)


def _check_icon(data: bytes) -> None:
    """Check the pictures within an ICO or ICNS, which are opened with it, and may be bombs."""
    if len(data) > _ICON_BYTES:
        raise ImageError(f"is too large to be opened: an icon of {len(data):,} bytes")
    sizes = [
        struct.unpack(">II", found[1])
        for pattern in (_INNER_PNG, _INNER_J2K)
        for found in pattern.finditer(data)
    ]
    for entry in range(6, 6 + 16 * min(data[4] + 256 * data[5], len(data) // 16), 16):
        at = int.from_bytes(data[entry + 12 : entry + 16], "little")
        if (
            data[:4] != b"icns" and data[at : at + 4] == b"\x28\0\0\0"
        ):  # a bitmap, of twice its height
            width, height = struct.unpack("<ii", data[at + 4 : at + 12].ljust(8, b"\0"))
            sizes.append((abs(width), abs(height) // 2))
    for width, height in sizes:
        if width * height > _PIXELS["ICO"]:
            raise ImageError(f"is too large to be opened: an icon of {width}x{height} pixels")


def _check_tiff(data: bytes) -> None:
    """Check the first directory of a TIFF, all of whose values are copied when it is opened."""
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
                # libtiff would write to stderr that it can't.
                raise ImageError("is a TIFF compressed as WebP, which few programs can read")
            size = values * _TIFF_SIZES.get(kind, 1)
            if size > begin.size and place + size <= len(data):
                total += size
                if kind not in (1, 2, 6, 7) and values > _TIFF_ENTRIES:
                    raise ImageError(f"is no ordinary TIFF: a tag has {values:,} values")
    except struct.error:
        return  # Pillow will say what is wrong with it
    if total > len(data):
        raise ImageError("is no ordinary TIFF: its tags have more values than it has bytes")


# -- what Pillow leaves undone --------------------------------------------------------


def _scale_key(image: Image.Image, *, depth: int) -> None:
    """Scale the colour that stands for nothing as Pillow has scaled the pixels of a PNG."""
    key: Any = image.info.get("transparency")
    if isinstance(key, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _framed(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """Return a GIF's first frame with nothing around it, where Pillow has put some colour."""
    canvas = Image.new("RGBA", image.size)
    canvas.paste(image.crop(box).convert("RGBA"), box)
    canvas.format = image.format
    return canvas
