"""Pictures that can't be sent as they are: decoded, made plain, fitted, encoded. Loads Pillow.

Every step either lets go of the GIL (as decoding, `resize`, `transpose` and
encoding do), or works on a strip of the picture, so that an event loop in another
thread goes on. Strips also keep memory down to the picture and its plain copy.
Pillow's global state is left alone.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, TypeAlias, cast

from PIL import Image

from moondream_async.errors import ImageError
from moondream_async.types import EncodedImage

from .header import Header, check_size, exif_orientation, xmp_orientation
from .inputs import ImageSource

_QUALITIES: Final = (
    95,
    90,
)  # below that, fewer pixels show more than the same number of worse ones
_MAX_JPEG_SIDE: Final = 65_500  # libjpeg's
_STRIP_PIXELS: Final = 1 << 18  # worked on under the GIL, at a time
_TILE: Final = 64  # side of the squares that are tried to tell a drawing from a photo, 24 at most

# Of Pillow's formats, those that pictures come in. Others are decoded in Python, for
# minutes if the header says so (DDS), or by programs that would be started (EPS).
_FORMATS: Final = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000"}
    | {"PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP"}
)

# What a JPEG decoder that lacks data takes for them; without it, it goes on with zeros.
_NO_END: Final = b"".join(
    (b"\xaa" * 256, *(bytes([0xFF, 0xD0 + number]) + b"\xaa" * 64 for number in range(8)))
)
_UPRIGHT_ALREADY: Final = ("AVIF", "HEIF")  # where other parts of the file say how they lie

_UPRIGHT: Final = {  # EXIF orientation -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Two threads must not load the same lazily opened picture: both would move its file.
_loading = threading.Lock()


def decode(
    source: ImageSource, *, header: Header | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Decode a picture; make it plain, upright and small enough.

    Args:
        source: A file's bytes, a Pillow image (never changed) or an array.
        header: What was read of it already; None to take what the picture brings along.
        max_pixels: Width times height at most.

    Returns:
        A picture of mode RGB or L that is nobody else's.

    Raises:
        ImageError: It is nothing that Pillow can read, or is too large. Pillow
            raises other exceptions for what is damaged.
    """
    if isinstance(source, bytes):
        image = _decoded(source, max_pixels, header)
    elif isinstance(source, Image.Image):
        image = source
        check_size(*image.size)
        with _loading:
            _load(image)
    else:
        image = _from_array(source)
    orientation = _orientation(image) if header is None else header.orientation
    # Saving changes an image, and the caller's may be in use in other threads.
    image = _flattened(image, copy=image is source)
    size = _fitted(image.size, max_pixels)
    if size != image.size:
        image = _resized(image, size)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    image.info = {}  # Pillow would write comments and profiles from there
    return image


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
        max_bytes: The encoded size at most.

    Raises:
        ImageError: As for `decode`, or not even one pixel of it fits into `max_bytes`.
    """
    image = decode(source, header=header, max_pixels=max_pixels)
    # What was a JPEG has artefacts, which are not worth keeping exactly.
    was_jpeg = header is not None and header.media_type == "image/jpeg"
    if not was_jpeg and _is_drawn(image):
        data = _png(image)
        if len(data) <= max_bytes:
            return EncodedImage(data, "image/png", *image.size)
    return _fitting_jpeg(image, max_bytes)


def hides_something(shortened: bytes) -> bool:
    """Tell whether a picture is whole though the end of its data was taken away."""
    try:
        _load(_open(shortened))
    except Exception:  # noqa: BLE001 - decoders fail in any way
        return False
    return True


def _decoded(data: bytes, max_pixels: int | None, header: Header | None = None) -> Image.Image:
    """Decode a file; a JPEG over `max_pixels` at a half, a quarter or an eighth of its size."""
    image = _open(data)
    check_size(*image.size)
    if max_pixels is not None:
        image.draft(image.mode, _fitted(image.size, max_pixels))
    _load(image)
    if header is not None and header.unfinished:
        # What comes instead of data that are missing would show.
        end = len(data) - 2
        other = _decoded(data[:end] + _NO_END + data[end:], max_pixels)
        if other.tobytes() != image.tobytes():
            raise ImageError("is cut short: a JPEG that ends within its picture")
    return image


def _orientation(image: Image.Image) -> int:
    """Return what EXIF says, or XMP where it says nothing."""
    exif, xmp = image.info.get("exif"), image.info.get("xmp")
    found = exif_orientation(exif) if isinstance(exif, bytes) else 0
    if not found and isinstance(xmp, bytes) and image.format not in _UPRIGHT_ALREADY:
        found = xmp_orientation(xmp)
    return found or 1


def _load(image: Image.Image) -> None:
    """Decode a lazily opened picture.

    Pillow would clear the memory for the pixels under the GIL, which was seen to
    take 40 ms for 12 megapixels. `Image.new` does it without.
    """
    if getattr(image, "tile", None) and image.format in ("JPEG", "PNG") and not image.tell():
        image.im = Image.new(image.mode, image.size).im
    image.load()


def _open(data: bytes) -> Image.Image:
    """Do what `Image.open` does, without its warnings, for `_FORMATS` and those of plugins."""
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
            if name not in _FORMATS and factory.__module__.startswith("PIL."):
                continue  # not what somebody registered on purpose, as HEIC
            file.seek(0)
            try:
                # A string is the reason why the plugin can't, though the format is its own.
                if accept is None or accept(data[:16]) is True:
                    return factory(file, "")
            except Exception as error:  # noqa: BLE001 - plugins fail in any way on what is not theirs
                if accept is not None:
                    reason = reason or error
    raise ImageError("is not a picture of a known format") from reason


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


def _flattened(image: Image.Image, *, copy: bool) -> Image.Image:
    """Return the picture in mode RGB or L: 8 bits, sRGB, what is transparent on white.

    Args:
        image: Any picture; it is not changed.
        copy: Whether a new picture is wanted even if there is nothing to do.
    """
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    transparent = image.has_transparency_data
    mode = ("L" if grey else "RGB") + ("A" if transparent else "")
    if image.mode == "CMYK":
        mode = "CMYK"  # until its profile is applied
    to_srgb = _to_srgb(image.info.get("icc_profile"), mode)
    if image.mode == mode[:3] and not (copy or transparent or to_srgb):
        return image
    to_bytes = _to_bytes(image)
    flat = Image.new("L" if grey else "RGB", image.size, "white")
    for top, bottom in _strips(*image.size):
        strip = image.crop((0, top, image.width, bottom))
        if to_bytes is not None:
            strip = to_bytes(strip)
        if strip.mode != mode:
            strip = strip.convert(mode)
        if to_srgb is not None:
            strip = to_srgb(strip)
        flat.paste(strip, (0, top), strip if transparent else None)
    return flat


_Step: TypeAlias = Callable[[Image.Image], Image.Image]


def _to_bytes(image: Image.Image) -> _Step | None:
    """Return what scales samples of more than 8 bits, as `encode_image` says, without clipping."""
    if image.mode.startswith("I;16"):
        return _from_16_bits
    if image.mode not in ("I", "F"):
        return None
    low, high = _extrema(image)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("has pixels that are not finite numbers")
    if low < 0 or high > (65535 if image.mode == "I" else 255):
        scale, offset = 255 / ((high - low) or 1), low
    elif image.mode == "F":
        scale, offset = (255, 0) if high <= 1 else (1, 0)
    else:
        scale, offset = (1 / 257, 0) if high > 255 else (1, 0)
    return lambda strip: _scaled(strip.convert("F"), scale, offset)


def _from_16_bits(strip: Image.Image) -> Image.Image:
    wide = strip.convert("I")  # of the kinds of I;16, some convert to nothing else
    grey = _scaled(wide.convert("F"), 1 / 257, 0)
    key = grey.info.pop("transparency", None)  # a PNG's colour that stands for nothing
    if isinstance(key, int):
        grey.putalpha(wide.point([255] * key + [0] + [255] * (65535 - key), "L"))
    return grey


def _scaled(strip: Image.Image, scale: float, offset: float) -> Image.Image:
    # Conversion to L cuts the fraction off; half a step makes that rounding.
    return strip.point(lambda value: value * scale + (0.5 - offset * scale)).convert("L")


def _extrema(image: Image.Image) -> tuple[float, float]:
    """Return the least and the greatest value of a picture with one band."""
    strips = (image.crop((0, top, image.width, end)) for top, end in _strips(*image.size))
    found = [cast("tuple[float, float]", strip.getextrema()) for strip in strips]
    return min(low for low, _ in found), max(high for _, high in found)


def _to_srgb(profile: bytes | None, mode: str) -> _Step | None:
    """Return what converts from the colours of an ICC profile, if it is of any use."""
    if not profile or mode == "LA":
        return None
    from PIL import ImageCms  # noqa: PLC0415 - few pictures need it

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(
            source, target, mode, "RGBA" if mode == "RGBA" else "RGB"
        )
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return transform.apply


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
    across, down = min(4, -(-width // _TILE)), min(6, -(-height // _TILE))
    if width * height > across * down * _TILE**2:
        sample = Image.new(image.mode, (across * _TILE, down * _TILE))
        for row, column in itertools.product(range(down), range(across)):
            left = column * (width - _TILE) // max(1, across - 1)
            top = row * (height - _TILE) // max(1, down - 1)
            tile = image.crop((left, top, left + _TILE, top + _TILE))
            sample.paste(tile, (column * _TILE, row * _TILE))
        image = sample
    return len(_png(image, level=3)) < len(_jpeg(image, _QUALITIES[0]))


def _png(image: Image.Image, *, level: int = 6) -> bytes:
    file = io.BytesIO()  # the compressor lets go of the GIL by itself
    image.save(file, "PNG", compress_level=level)
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
