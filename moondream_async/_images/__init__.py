"""Any picture -> the bytes to send. Pure and synchronous; the client runs it in a thread.

In comes whatever a caller has; out comes an `EncodedImage`, or an `ImageError`
that names the picture and the reason. Most files need no decoding: their
structure is walked (`jpeg`, `png`, `gif`, `webp`), their metadata is cut out, and
the picture itself goes bit for bit as it is. The others are decoded within a budget
(`decoders`), made plain (`colour`) and encoded anew (`convert`), and only for them
Pillow is loaded. `inputs` reads paths, files and data URIs; `formats` tells by their
names which files can be prepared.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moondream_async.errors import ImageError, RequestError
from moondream_async.types import EncodedImage

from . import gif, inputs, jpeg, png, webp
from .formats import can_prepare
from .header import Header, check_size
from .inputs import ImageSource, is_path

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "ImageSource",
    "can_prepare",
    "decode_image",
    "encode_at_once",
    "encode_image",
    "encode_small_file",
    "is_path",
]

_AT_ONCE_BYTES = 16 * 1024
"""Files up to here are walked in 0.1 ms, and in a few ms if made to be slow."""

_SMALL_FILE_BYTES = 256 * 1024
"""Files up to here are read several at a time."""

_AT_ONCE_PIXELS = 100_000
"""Pictures up to here are inflated in a ms, and decoded in a few, where that must be done."""


def encode_image(
    image: ImageSource | EncodedImage,
    *,
    max_pixels: int | None = None,
    max_bytes: int = 10_000_000,
) -> EncodedImage:
    """Return a picture as it will be sent: upright, private, and within the server's limits.

    `image` is a path, bytes, a binary file (read from where it stands, and left
    open), a Pillow image (never changed), a numpy array of uint8 (height x width,
    x 1, x 3 RGB or x 4 RGBA; OpenCV's BGR as ``frame[:, :, ::-1]``, which costs
    nothing), a ``data:`` URI, or an `EncodedImage` (returned as
    it is when it keeps the limits).

    JPEG, PNG, GIF and WebP files are sent without being encoded anew. EXIF (with the
    place and the thumbnail in it), XMP, IPTC, comments, text, all frames but the
    first, and whatever follows the picture or stands where nothing belongs are cut
    out; every pixel stays as it was, and so do ICC profiles. Decoded and encoded anew are:

    - BMP, TIFF, AVIF, JPEG 2000, ICO, ICNS, PCX, PPM, TGA, HEIC with the extra ``heif``,
      and what a Pillow plugin adds that you have registered; Pillow images and arrays;
    - CMYK, palettes (but for GIF's), more than 8 bits, and anything that may be
      transparent, which is laid on white: what servers do with these differs;
    - a picture whose orientation, in EXIF or else in XMP, says that it lies on its
      side: it is turned upright, so that boxes and points fit what people see;
    - what is damaged so that viewers still show it, as a JPEG with stray bytes;
    - a picture with bytes hidden behind its own compressed data (but for JPEG, where
      nothing tells of them);
    - what is over a limit.

    Then ICC colours become sRGB. The result is PNG if that is smaller, as for
    drawings and screenshots, else JPEG at quality 95 (4:4:4), lowered to 90
    and then made smaller in pixels until it fits. What `max_pixels` has made smaller is
    JPEG at quality 90 (4:2:0), in half the bytes. What has more than 33 million pixels
    is sent at half its width and height. 16-bit samples are scaled to 8
    bits. Values of Pillow's modes I and F are taken as they are when all are
    within 0-255, as 16 bits (I) when within 0-65535, as fractions (F) when within
    0-1; any other range is stretched to black and white.

    One picture costs at most 1 GB of memory and about ten seconds of one core. So
    pictures of more than 89 million pixels are refused, and fewer are taken of kinds
    that are dear to decode: 64 million of HEIC, 50 of AVIF, 40 of WebP, 25 of JPEG
    2000, one of icons and of what Pillow decodes in Python (plain PPM, BMP with run
    lengths). The limits do not hold for what is sent without being decoded.

    Args:
        image: The picture.
        max_pixels: Width times height at most, for who pays by upload. The
            model looks at about 1.9 million pixels, of larger pictures too.
        max_bytes: The size at most, before base64 (which adds a third).

    Raises:
        ImageError: The picture is missing, damaged, cut short, of an unknown
            format, or too large to be opened. Only what can be told without
            decoding is checked where nothing is decoded.
        MissingExtraError: It is HEIC, and the extra ``heif`` is not installed; this is
            an `ImageError` too.
        RequestError: A limit is not a positive whole number.
    """
    for name, limit in (("max_pixels", max_pixels), ("max_bytes", max_bytes)):
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise RequestError(f"{name} must be a positive whole number, not {limit!r}")
    if isinstance(image, EncodedImage):
        few_pixels = max_pixels is None or image.width * image.height <= max_pixels
        if few_pixels and len(image.data) <= max_bytes:
            return image
        image = image.data
    with _naming(image):
        return _encode(image, max_pixels, max_bytes)


def encode_at_once(image: object, *, max_pixels: int | None = None) -> EncodedImage | None:
    """Do the same for a small file in memory that needs no decoding; None if it is none.

    That takes a third of the time that a thread for it would cost. Whatever is wrong with
    a picture is left for `encode_image` to say.
    """
    if not isinstance(image, bytes) or len(image) > _AT_ONCE_BYTES:
        return None
    return _encode_small(image, max_pixels)


def encode_small_file(path: object, *, max_pixels: int | None = None) -> EncodedImage | None:
    """Do the same for a small file that has still to be read: work for a thread, but of a ms."""
    try:
        return _encode_small(inputs.read(path, _SMALL_FILE_BYTES), max_pixels)
    except Exception:  # noqa: BLE001 - see above
        return None


def _encode_small(image: bytes, max_pixels: int | None) -> EncodedImage | None:
    try:
        if image.startswith(png.SIGNATURE):
            width, height = struct.unpack(">II", image[16:24])
            if width * height > _AT_ONCE_PIXELS:
                return None
        data, header = _read(image)
        if header is not None and header.shortened is not None:
            few = header.width * header.height <= _AT_ONCE_PIXELS
            if not few or "moondream_async._images.convert" not in sys.modules:
                return None
        return _as_it_is(data, header, max_pixels, len(image))
    except Exception:  # noqa: BLE001 - see above
        return None


def decode_image(image: ImageSource | EncodedImage, *, max_pixels: int | None = None) -> Image:
    """Return a picture decoded, as `encode_image` would send it: for showing it, or drawing on it.

    So it is upright and of mode RGB or L, in its own size or smaller. It is nobody else's.
    This is the one way in which a picture is decoded: its file is opened only if it is a
    regular one, by the decoders that `encode_image` uses, and within the same budget.

    Args:
        image: The picture, as for `encode_image`.
        max_pixels: Width times height at most, as for a small picture on a page.

    Raises:
        ImageError: As for `encode_image`.
    """
    source = image.data if isinstance(image, EncodedImage) else image
    with _naming(source):
        source, header = _read(source)
        from . import convert  # noqa: PLC0415 - loads Pillow

        return convert.decode(source, header=header, max_pixels=max_pixels)


@contextlib.contextmanager
def _naming(image: ImageSource) -> Iterator[None]:
    """Turn whatever goes wrong with a picture into an `ImageError` that names it."""
    try:
        yield
    except ImageError as error:
        raise type(error)(f"{inputs.describe(image)} {error}") from error.__cause__
    except Exception as error:  # Pillow, fed with what anybody may have made, raises anything
        reason = str(error) or type(error).__name__
        raise ImageError(f"{inputs.describe(image)} can't be decoded: {reason}") from error


def _encode(image: ImageSource, max_pixels: int | None, max_bytes: int) -> EncodedImage:
    image, header = _read(image)
    ready = _as_it_is(image, header, max_pixels, max_bytes)
    if ready is not None:
        return ready
    from . import convert  # noqa: PLC0415 - loads Pillow, which most pictures don't need

    return convert.encode(image, header=header, max_pixels=max_pixels, max_bytes=max_bytes)


def _as_it_is(
    image: ImageSource, header: Header | None, max_pixels: int | None, max_bytes: int
) -> EncodedImage | None:
    """Return a file that can be sent without being decoded; None if it can't."""
    if header is None or not isinstance(image, bytes):
        return None
    few_pixels = max_pixels is None or header.width * header.height <= max_pixels
    if not (header.plain and header.orientation == 1 and few_pixels and len(image) <= max_bytes):
        return None
    if header.shortened is not None:
        from . import convert  # noqa: PLC0415 - loads Pillow, which JPEG and PNG don't need

        if convert.hides_something(header.shortened(), header):
            return None
    return EncodedImage(image, header.media_type, header.width, header.height)


def _read(image: ImageSource) -> tuple[ImageSource, Header | None]:
    """Return a Pillow image or an array as it is, and all else as bytes: cleaned, with a header.

    The header is None where the file is of no format that servers take.
    """
    if inputs.is_pillow(image) or inputs.is_array(image):
        return image, None
    data = inputs.read(image)
    header = _parse(data)
    if header is None:
        return data, None
    check_size(header.width, header.height)
    return header.cleaned(data), header


def _parse(data: bytes) -> Header | None:
    """Walk the file if it is of a format that servers take; None if it is not."""
    if data.startswith(b"\xff\xd8\xff"):
        return jpeg.parse(data)
    if data.startswith(png.SIGNATURE):
        return png.parse(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return gif.parse(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp.parse(data)
    return None
