"""Pictures that can't be sent as they are: decoded, made plain, fitted, encoded. Loads Pillow.

Every step either releases the GIL (as decoding, `resize`, `transpose` and encoding do), or
works on a strip of the picture, so that an event loop in another thread goes on. With strips
the memory is that of the picture and its plain copy. Pillow's global state is not changed.
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from PIL import Image

from moondream_async.errors import ImageError
from moondream_async.types import EncodedImage

from .colour import flattened, strips
from .decoders import decode_file, load, quiet
from .header import Header, check_size, exif_orientation, xmp_orientation
from .inputs import ImageSource

# Below these, fewer pixels in good quality show more than all of them in bad quality.
_QUALITIES: Final = (95, 90)
_MAX_JPEG_SIDE: Final = 65_500  # libjpeg's
_MOST_PIXELS: Final = 1 << 25  # larger pictures are sent at half their width and height, or less
_FRAME_PIXELS: Final = 1 << 22  # of an array that is copied at once, in milliseconds
_MANY_COLOURS: Final = 4096  # no drawing has more colours in the squares below
_TILE: Final = 64  # side of the squares by which a drawing is told from a photo, 24 at most

_UPRIGHT_ALREADY: Final = ("AVIF", "HEIF")  # the decoder turns them, by other data than XMP

_UPRIGHT: Final = {  # EXIF orientation -> the step that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    source: ImageSource, *, header: Header | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode a picture; make it plain, upright and small enough.

    Args:
        source: A file's bytes, a Pillow image (never changed) or an array.
        header: The header, where the file's bytes were walked.
        max_pixels: The most pixels.

    Returns:
        A new picture of mode RGB or L.

    Raises:
        ImageError: Pillow can't read it, or it is too large. Damaged pictures raise other
            exceptions of Pillow.
    """
    return _prepared(source, header, max_pixels)[0]


def _prepared(
    source: ImageSource, header: Header | None, max_pixels: int | None, *, halve: bool = False
) -> tuple[Image.Image, bool]:
    """Do what `decode` does; also return whether `max_pixels` has made it smaller."""
    resize = _resized
    with quiet():
        if isinstance(source, bytes):
            enough = None
            if header is not None:
                enough = _fitted((header.width, header.height), max_pixels, halve=halve)
            image = decode_file(source, header, enough)
        elif isinstance(source, Image.Image):
            check_size(*source.size)
            load(source)
            image = source
        else:
            image = _from_array(source)
            resize = _resized_fast
        upright = _UPRIGHT.get(_orientation(image) if header is None else header.orientation)
        given = image.size
        if header is not None and header.media_type == "image/jpeg":  # decoded smaller, perhaps
            given = header.width, header.height
        size = _fitted(given, max_pixels, halve=halve)
        image = _made_plain(image, size, resize, copy=image is source)
        if upright is not None:
            image = image.transpose(upright)
    image.info = {}  # Pillow would write comments and profiles from there
    return image, max_pixels is not None and size != given


def _made_plain(
    image: Image.Image,
    size: tuple[int, int],
    resize: Callable[[Image.Image, tuple[int, int]], Image.Image],
    *,
    copy: bool,
) -> Image.Image:
    """Return a picture in mode RGB or L and in a size; with `copy`, never the same object."""
    if size == image.size:
        # Saving changes an image, and the caller's image may be in use in other threads.
        return flattened(image, copy=copy)
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return flattened(resize(image, size), copy=False)  # fewer pixels to flatten
    factor = min(image.width // size[0], image.height // size[1])
    if image.width * image.height <= _MOST_PIXELS:
        factor //= 2  # the finer filter does the rest, where memory allows
    image = flattened(image, copy=False, factor=max(1, factor))
    return image if size == image.size else resize(image, size)


def encode(
    source: ImageSource,
    *,
    header: Header | None,
    max_pixels: int | None,
    max_bytes: int,
) -> EncodedImage:
    """Decode a picture as `decode` does, and encode it.

    Args:
        source: As for `decode`.
        header: As for `decode`.
        max_pixels: As for `decode`.
        max_bytes: The most bytes of the result.

    Raises:
        ImageError: As for `decode`, or not even one pixel fits into `max_bytes`.
    """
    image, smaller = _prepared(source, header, max_pixels, halve=True)
    # A JPEG has artefacts, which a PNG would keep exactly for nothing.
    was_jpeg = header is not None and header.media_type == "image/jpeg"
    if not was_jpeg and _is_drawn(image):
        data = _png(image)
        if len(data) <= max_bytes:
            return EncodedImage(data, "image/png", *image.size)
    return _fitting_jpeg(image, max_bytes, saving=smaller)


def hides_something(shortened: bytes, header: Header) -> bool:
    """Tell whether a picture can be decoded without the end of its data: then bytes follow it."""
    try:
        with quiet():
            decode_file(shortened, header)
    except Exception:  # noqa: BLE001 - decoders fail in any way
        return False
    return True


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF, else in XMP, else 1."""
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    found = exif_orientation(exif) if isinstance(exif, bytes) else 0
    if not found and isinstance(xmp, bytes) and image.format not in _UPRIGHT_ALREADY:
        found = xmp_orientation(xmp)
    return found or 1


def _from_array(array: Any) -> Image.Image:
    """Copy an array of bytes, height x width (x 1, 3 RGB or 4 RGBA).

    A reversed view (OpenCV's BGR as ``array[:, :, ::-1]``) is put in order by the same copy.

    Raises:
        ImageError: The array has another shape or another type.
    """
    interface = array.__array_interface__
    shape, kind = tuple(interface["shape"]), interface["typestr"]
    if kind != "|u1":
        raise ImageError(f"has values of type {kind}: expected uint8, 0 to 255")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"has the shape {shape}: expected (height, width), or (height, width, channels) "
            "with 1, 3 or 4 channels"
        )
    height, width = shape[:2]
    check_size(width, height)
    mode = raw = {1: "L", 3: "RGB", 4: "RGBA"}[shape[2] if len(shape) == 3 else 1]
    if mode == "RGB" and (interface.get("strides") or (0, 0, 1))[2] == -1:
        array, raw = array[:, :, ::-1], "BGR"
    if width * height <= _FRAME_PIXELS:
        return _from_rows(array, mode, (width, height), raw)
    image = Image.new(mode, (width, height))
    for top, bottom in strips(width, height):
        strip = _from_rows(array[top:bottom], mode, (width, bottom - top), raw)
        image.paste(strip, (0, top))
    return image


def _from_rows(rows: Any, mode: str, size: tuple[int, int], raw: str) -> Image.Image:
    view = memoryview(rows)
    data = view if view.c_contiguous else view.tobytes()
    return Image.frombytes(mode, size, data, "raw", raw, 0, 1)


def _fitted(
    size: tuple[int, int], max_pixels: int | None, *, halve: bool = False
) -> tuple[int, int]:
    """Return the largest size of the same shape within `max_pixels` and JPEG's limit.

    With `halve`, more than `_MOST_PIXELS` become at most half the width and height.

    >>> _fitted((4000, 3000), 1_000_000)
    (1154, 866)
    >>> _fitted((1, 5000), 100)
    (1, 100)
    """
    width, height = size
    limit = min(max_pixels or width * height, width * height)
    if halve and width * height > _MOST_PIXELS:
        limit = min(limit, width * height // 4)
    scale = min(math.sqrt(limit / (width * height)), _MAX_JPEG_SIDE / max(size))
    if scale >= 1:
        return size
    width = max(1, min(int(width * scale), limit))
    height = max(1, min(int(height * scale), limit // width))
    return width, height


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _resized_fast(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Do the same for a frame of a moving picture, in a fifth of the time.

    Each pixel is the mean of two samples, a quarter of its width left and right of its middle.
    """
    factor = min(image.width // size[0], image.height // size[1])
    if factor > 1:
        image = image.reduce(factor)
    width, height = image.size
    right, down = width / size[0] / 2, height / size[1] / 2
    one, other = (
        image.resize(size, Image.Resampling.NEAREST, box)
        for box in ((0, 0, width - right, height - down), (right, down, width, height))
    )
    return Image.blend(one, other, 0.5)


def _is_drawn(image: Image.Image) -> bool:
    """Tell whether this is a drawing or a screenshot: a sample of it is smaller as PNG."""
    width, height = image.size
    across, down = min(4, -(-width // _TILE)), min(6, -(-height // _TILE))
    if width * height > across * down * _TILE**2:
        sample = Image.new(image.mode, (across * _TILE, down * _TILE))
        for row in range(down):
            top = row * (height - _TILE) // max(1, down - 1)
            for column in range(across):
                left = column * (width - _TILE) // max(1, across - 1)
                tile = image.crop((left, top, left + _TILE, top + _TILE))
                sample.paste(tile, (column * _TILE, row * _TILE))
            first = sample.crop((0, 0, across * _TILE, _TILE)) if row == 0 else None
            if first is not None and first.getcolors(_MANY_COLOURS) is None:
                return False  # the first squares show most photos, in a fifth of the time
        image = sample
    if image.getcolors(_MANY_COLOURS) is None:
        return False
    return len(_png(image, level=3)) < len(_jpeg(image, _QUALITIES[0]))


def _png(image: Image.Image, *, level: int = 6) -> bytes:
    file = io.BytesIO()  # the compressor releases the GIL by itself
    image.save(file, "PNG", compress_level=level)
    return file.getvalue()


def _jpeg(image: Image.Image, quality: int, *, subsampling: str = "4:4:4") -> bytes:
    """Encode; with the colours in full resolution, edges of coloured text stay sharp."""
    with _memory_file() as file:
        image.save(file, "JPEG", quality=quality, subsampling=subsampling)
        file.seek(0)
        return file.read()


def _memory_file() -> BinaryIO:
    """Return a file in memory, with a descriptor where the system has such files.

    The JPEG encoder releases the GIL only while it writes to a descriptor. With a BytesIO
    other threads wait up to 2 ms at a time.
    """
    if sys.platform == "linux":
        try:
            return open(os.memfd_create("picture"), "w+b")  # noqa: PTH123 - there is no path
        except (AttributeError, OSError):
            pass
    return io.BytesIO()


def _fitting_jpeg(image: Image.Image, max_bytes: int, *, saving: bool) -> EncodedImage:
    """Encode in the best quality that fits; when none does, in fewer pixels.

    With `saving`, a small upload: half the bytes, in half the time.
    """
    data = b""
    for quality in _QUALITIES[saving:]:
        data = _jpeg(image, quality, subsampling="4:2:0" if saving else "4:4:4")
        if len(data) <= max_bytes:
            return EncodedImage(data, "image/jpeg", *image.size)
    smaller = image
    while smaller.size != (1, 1):
        scale = min(0.9, 0.97 * math.sqrt(max_bytes / len(data)))
        width, height = (max(1, int(side * scale)) for side in smaller.size)
        smaller = _resized(image, (width, height))
        data = _jpeg(smaller, _QUALITIES[-1])
        if len(data) <= max_bytes:
            return EncodedImage(data, "image/jpeg", width, height)
    raise ImageError(f"can't be made to fit into {max_bytes} bytes")
