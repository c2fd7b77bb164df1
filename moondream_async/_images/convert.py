"""Pictures that can't be sent as they are: decoded, made plain, fitted, encoded. Loads Pillow.

Every step either lets go of the GIL (in libImaging: decoding, `convert`,
`resize`, `transpose`, `paste`, `crop`) or works on a strip, so that an event loop
in another thread goes on. Pillow's global state is left alone.
"""

from __future__ import annotations

import io
import math
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO, Final, cast

from PIL import Image

from moondream_async.errors import ImageError
from moondream_async.types import EncodedImage

from .header import check_size, exif_orientation
from .inputs import ImageSource

_QUALITIES: Final = (
    95,
    90,
)  # below that, fewer pixels show more than the same number of worse ones
_MAX_JPEG_SIDE: Final = 65_500  # libjpeg's
_STRIP_PIXELS: Final = 1 << 19  # worked on under the GIL, at a time
_SAMPLE_PIXELS: Final = 1 << 18

# EPS is a program, and opening it would start Ghostscript; the rest need libraries
# of which Pillow has the stub only.
_REFUSED_FORMATS: Final = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

_UPRIGHT: Final = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FROM_16_BITS: Final = [(value * 255 + 32767) // 65535 for value in range(65536)]

# Two threads must not load the same lazily opened picture: both would move its file.
_loading = threading.Lock()


def decode(image: ImageSource, max_pixels: int | None) -> Image.Image:
    """Return a picture of our own, decoded from bytes, or copied from an image or an array.

    A JPEG over `max_pixels` is decoded at a half, a quarter or an eighth of its size.

    Raises:
        ImageError: It is none that Pillow can read, or too large. Pillow raises
            other exceptions for what is damaged.
    """
    if isinstance(image, bytes):
        opened = _open(image)
        check_size(*opened.size)
        if max_pixels is not None:
            opened.draft(opened.mode, _fitted(opened.size, max_pixels))
        opened.load()
        return opened
    if isinstance(image, Image.Image):
        check_size(*image.size)
        with _loading:
            image.load()
        return image.copy()  # the caller's may be in use in other threads, and saving changes it
    return _from_array(image)


def _from_array(array: Any) -> Image.Image:
    """Copy an array of bytes, height x width (x 1, 3 RGB or 4 RGBA), in strips.

    Raises:
        ImageError: It has another shape or another type.
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
    channels = shape[2] if len(shape) == 3 else 1
    image = Image.new({1: "L", 3: "RGB", 4: "RGBA"}[channels], (width, height))
    for top, bottom in _strips(width, height):
        rows = array[top:bottom]
        strip = rows[:, :, 0] if len(shape) == 3 and channels == 1 else rows
        image.paste(Image.fromarray(strip), (0, top))
    return image


def encode(
    image: Image.Image,
    *,
    orientation: int | None,
    max_pixels: int | None,
    max_bytes: int,
    may_be_png: bool,
) -> EncodedImage:
    """Make a picture plain, upright and small enough; encode it.

    Args:
        image: As `decode` returned it.
        orientation: EXIF's; None to take the one that the picture brings along.
        max_pixels: Width times height at most.
        max_bytes: The encoded size at most.
        may_be_png: Whether to try PNG: not for what was a JPEG, whose artefacts
            are not worth keeping exactly.

    Raises:
        ImageError: Not even one pixel fits into `max_bytes`.
    """
    exif = image.info.get("exif")
    if orientation is None:
        orientation = exif_orientation(exif) if isinstance(exif, bytes) else 1
    image = _flattened(image)
    size = _fitted(image.size, max_pixels)
    if size != image.size:
        image = _resized(image, size)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # Pillow would write comments and profiles from there
    if may_be_png and _is_drawn(image):
        data = _png(image)
        if len(data) <= max_bytes:
            return EncodedImage(data, "image/png", *image.size)
    return _fitting_jpeg(image, max_bytes)


def _open(data: bytes) -> Image.Image:
    """Do what `Image.open` does, without its warnings and without `_REFUSED_FORMATS`."""
    file = io.BytesIO(data)
    tried = set(_REFUSED_FORMATS)
    reason: Exception | None = None
    for load_plugins in (Image.preinit, Image.init):  # the common ones, then all
        load_plugins()
        for name in Image.ID:
            if name in tried:
                continue
            tried.add(name)
            factory, accept = Image.OPEN[name]
            file.seek(0)
            try:
                # A string is the reason why the plugin can't, though the format is its own.
                if accept is None or accept(data[:16]) is True:
                    return factory(file, "")
            except Exception as error:  # noqa: BLE001 - plugins fail in any way on what is not theirs
                if accept is not None:
                    reason = reason or error
    raise ImageError("is not a picture of a known format") from reason


def _flattened(image: Image.Image) -> Image.Image:
    """Return the picture in mode RGB or L: 8 bits, sRGB, what is transparent on white."""
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _in_eight_bits(image)
    transparent = image.has_transparency_data
    if transparent and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        image = _in_srgb(image, profile)
    if transparent:
        canvas = Image.new("L" if image.mode == "LA" else "RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Scale what has more than 8 bits a sample, as `encode_image` says. Nothing is clipped."""
    if image.mode.startswith("I;16"):
        key = image.info.pop("transparency", None)
        wide = image.convert("I")
        image = wide.point(_FROM_16_BITS, "L")
        if isinstance(key, int):
            image.putalpha(wide.point([255] * key + [0] + [255] * (65535 - key), "L"))
        return image
    low, high = _extrema(image)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("has pixels that are not finite numbers")
    if low >= 0 and image.mode == "I" and 255 < high <= 65535:
        return image.point(_FROM_16_BITS, "L")
    scale, offset = 255 / ((high - low) or 1), -low
    if low >= 0 and high <= 255:
        scale, offset = 255 if image.mode == "F" and high <= 1 else 1, 0
    # Conversion to L cuts the fraction off; half a step makes that rounding.
    scaled = image.convert("F").point(lambda value: value * scale + (offset * scale + 0.5))
    return scaled.convert("L")


def _extrema(image: Image.Image) -> tuple[float, float]:
    """Return the least and the greatest value of a picture with one band."""
    strips = (image.crop((0, top, image.width, end)) for top, end in _strips(*image.size))
    found = [cast("tuple[float, float]", strip.getextrema()) for strip in strips]
    return min(low for low, _ in found), max(high for _, high in found)


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert from the colours of an ICC profile; return the same picture if it is of no use."""
    from PIL import ImageCms  # noqa: PLC0415 - few pictures need it

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return image
    if converted is None:
        return image
    return converted.convert("L") if image.mode == "L" else converted


def _fitted(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """Return the largest size of the same shape within `max_pixels` and JPEG's limit.

    >>> _fitted((4000, 3000), 1_000_000)
    (1154, 866)
    >>> _fitted((1, 5000), 100)
    (1, 100)
    """
    width, height = size
    limit = min(max_pixels or width * height, width * height)
    scale = min(math.sqrt(limit / (width * height)), _MAX_JPEG_SIDE / max(size))
    if scale >= 1:
        return size
    width = max(1, min(int(width * scale), limit))
    height = max(1, min(int(height * scale), limit // width))
    return min(width, limit // height), height


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _strips(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Cut a picture into strips that are quickly worked on: their upper and lower edges."""
    step = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, step):
        yield top, min(top + step, height)


def _is_drawn(image: Image.Image) -> bool:
    """Tell a drawing or a screenshot from a photo: it is smaller as PNG. Tried on a sample."""
    width, height = image.size
    bands = 8
    rows = max(16, _SAMPLE_PIXELS // (width * bands))
    if rows * bands < height:
        sample = Image.new(image.mode, (width, rows * bands))
        for band in range(bands):
            top = band * (height - rows) // (bands - 1)
            sample.paste(image.crop((0, top, width, top + rows)), (0, band * rows))
        image = sample
    return len(_png(image)) < len(_jpeg(image, _QUALITIES[0]))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()  # the compressor lets go of the GIL by itself
    image.save(file, "PNG")
    return file.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode, with the colours in full resolution: edges of coloured text stay sharp."""
    with _memory_file() as file:
        image.save(file, "JPEG", quality=quality, subsampling="4:4:4")
        file.seek(0)
        return file.read()


def _memory_file() -> BinaryIO:
    """Return a file that is nowhere on a disk.

    The JPEG encoder lets go of the GIL only while it writes to a descriptor. A
    BytesIO, where there is no such thing, costs other threads up to 2 ms a turn.
    """
    if sys.platform == "linux":
        try:
            return open(os.memfd_create("picture"), "w+b")  # noqa: PTH123 - there is no path
        except (AttributeError, OSError):
            pass
    return io.BytesIO()


def _fitting_jpeg(image: Image.Image, max_bytes: int) -> EncodedImage:
    """Encode in the best quality that fits; when none does, take away pixels."""
    data = b""
    for quality in _QUALITIES:
        data = _jpeg(image, quality)
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
