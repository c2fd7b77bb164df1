"""Any picture -> the bytes to send. Pure and synchronous; the client runs it in a thread.

The input is a picture in any form; the output is an `EncodedImage`, or an `ImageError` that
names the picture and the reason. Most files need no decoding: their structure is walked
(`jpeg`, `png`, `gif`, `webp`), their metadata is cut out, and the picture itself is sent bit
for bit. Other pictures are decoded within a budget (`decoders`), made plain (`colour`) and
encoded again (`convert`); only they load Pillow. `inputs` reads paths, files and data URIs;
`formats` tells by a file's name whether it can be prepared.
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
"""Files up to this size are walked in 0.1 ms; if made to be slow, in a few ms."""

_SMALL_FILE_BYTES = 256 * 1024
"""Files up to this size are read several at a time."""

_AT_ONCE_PIXELS = 100_000
"""Pictures up to this size are inflated in a millisecond, and decoded in a few."""


def encode_image(
    image: ImageSource | EncodedImage,
    *,
    max_pixels: int | None = None,
    max_bytes: int = 10_000_000,
) -> EncodedImage:
    """Return a picture as it will be sent: upright, private, and within the server's limits.

    `image` is a path, bytes, a binary file (read from its position on, and left open), a
    Pillow image (never changed), a numpy array of uint8 (height x width, x 1, x 3 RGB or
    x 4 RGBA; OpenCV's BGR as ``frame[:, :, ::-1]``, which is not copied), a ``data:`` URI,
    or an `EncodedImage` (returned as it is when it keeps the limits).

    JPEG, PNG, GIF and WebP files are sent without being encoded again. EXIF (with place and
    thumbnail), XMP, IPTC, comments, text, all frames but the first, and all bytes that belong
    to no part of the picture are cut out; pixels and ICC profiles stay. These pictures are
    decoded and encoded again:

    - BMP, TIFF, AVIF, JPEG 2000, ICO, ICNS, PCX, PPM, TGA, HEIC with the extra ``heif``,
      formats of Pillow plugins that you have registered, Pillow images and arrays;
    - CMYK, palettes (but for GIF's), more than 8 bits, and transparency, which is laid on
      white: servers differ in how they show them;
    - a picture whose orientation in EXIF, or else in XMP, is not upright: it is turned, so
      that boxes and points fit what people see;
    - a damaged picture that viewers still show, as a JPEG with stray bytes;
    - a picture with bytes hidden behind its compressed data (but for JPEG, where they can't
      be detected);
    - a picture over a limit.

    Their ICC colours become sRGB. The result is PNG if that is smaller, as for drawings and
    screenshots, else JPEG at quality 95 (4:4:4), then at 90, then in fewer pixels until it
    fits. A picture that `max_pixels` has made smaller is JPEG at quality 90 (4:2:0), in half
    the bytes. A picture of more than 33 million pixels is sent at half its width and height.
    16-bit samples are scaled to 8 bits. Values of Pillow's modes I and F are taken as they
    are when all are within 0-255, as 16 bits (I) when within 0-65535, as fractions (F) when
    within 0-1; any other range is stretched to black and white.

    One picture costs at most 1 GB of memory and about ten seconds of one core. Pictures of
    more than 89 million pixels are refused, and costly formats have lower limits: 64 million
    pixels for HEIC, 50 for AVIF, 40 for WebP, 25 for JPEG 2000, one for icons and for what
    Pillow decodes in Python (plain PPM, BMP with run lengths). The lower limits do not hold
    for files that are sent without being decoded.

    Args:
        image: The picture.
        max_pixels: The most pixels, width times height, for a smaller upload. The model
            looks at about 1.9 million pixels, also of larger pictures.
        max_bytes: The most bytes, before base64 (which adds a third).

    Raises:
        ImageError: The picture is missing, damaged, cut short, of an unknown format, or too
            large to be opened. A file that is sent without being decoded is checked only as
            far as that goes.
        MissingExtraError: The picture is HEIC, and the extra ``heif`` is not installed; this
            error is an `ImageError` too.
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
    """Do as `encode_image` for a small file in memory that needs no decoding, else return None.

    This takes a third of the time that a thread would cost. A faulty picture gives None, too:
    `encode_image` then raises the error.
    """
    if not isinstance(image, bytes) or len(image) > _AT_ONCE_BYTES:
        return None
    return _encode_small(image, max_pixels)


def encode_small_file(path: object, *, max_pixels: int | None = None) -> EncodedImage | None:
    """Do as `encode_at_once` for the path of a small file; this blocks for a millisecond."""
    return _encode_small(path, max_pixels)


def _encode_small(source: object, max_pixels: int | None) -> EncodedImage | None:
    try:
        image = inputs.read(source, _SMALL_FILE_BYTES)
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
    except Exception:  # noqa: BLE001 - `encode_image` raises it again
        return None


def decode_image(image: ImageSource | EncodedImage, *, max_pixels: int | None = None) -> Image:
    """Return a picture decoded as for `encode_image`, to show it or to draw on it.

    The result is a new picture, upright, of mode RGB or L, in its own size or smaller. All
    of the package decodes pictures by this function or `encode_image`: regular files alone,
    by the same decoders, within the same budget.

    Args:
        image: The picture, as for `encode_image`.
        max_pixels: The most pixels, as for a thumbnail.

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
    """Turn every exception about a picture into an `ImageError` that names the picture."""
    try:
        yield
    except ImageError as error:
        raise type(error)(f"{inputs.describe(image)} {error}") from error.__cause__
    except Exception as error:  # Pillow raises anything for a file that was made to harm
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
    """Return a file as it will be sent; None if it has to be decoded."""
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
    """Return a Pillow image or an array as it is, another picture as cleaned bytes, and its header.

    The header is None where servers do not take the file's format.
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
    """Return the header of a file whose format servers take, else None."""
    if data.startswith(b"\xff\xd8\xff"):
        return jpeg.parse(data)
    if data.startswith(png.SIGNATURE):
        return png.parse(data)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return gif.parse(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return webp.parse(data)
    return None
