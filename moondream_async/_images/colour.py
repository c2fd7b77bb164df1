"""Any mode into RGB or L: 8 bits, sRGB, transparency on white. Loads Pillow.

The work is done in strips of the picture, so that other threads go on between them, and the
memory is that of the picture and its plain copy.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias, cast

from PIL import Image, ImageChops

from moondream_async.errors import ImageError

_STRIP_PIXELS: Final = 1 << 18  # of a strip, which may hold the GIL
_SAME: Final = 2  # of 255, the most that sRGB profiles of different programs differ

_Step: TypeAlias = Callable[[Image.Image], Image.Image]


def flattened(image: Image.Image, *, copy: bool, factor: int = 1) -> Image.Image:
    """Return the picture in mode RGB or L: 8 bits, sRGB, transparency on white.

    Args:
        image: Any picture; it is not changed.
        copy: Whether the result must be a new picture even if nothing changes.
        factor: The divisor by which width and height become smaller.
    """
    grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
    transparent = image.has_transparency_data
    mode = ("L" if grey else "RGB") + ("A" if transparent else "")
    if image.mode == "CMYK":
        mode = "CMYK"  # until its profile is applied
    to_srgb = _to_srgb(image.info.get("icc_profile"), mode)
    if image.mode == mode[:3] and not (copy or transparent or to_srgb):
        return image if factor == 1 else image.reduce(factor)
    to_bytes = _to_bytes(image)
    size = -(-image.width // factor), -(-image.height // factor)
    flat = Image.new("L" if grey else "RGB", size, "white")
    for top, bottom in strips(*image.size, factor):
        strip = image.crop((0, top, image.width, bottom))
        if to_bytes is not None:
            strip = to_bytes(strip)
        if strip.mode != mode:
            strip = strip.convert(mode)
        if to_srgb is not None:
            strip = to_srgb(strip)
        if factor > 1:
            strip = strip.reduce(factor)
        flat.paste(strip, (0, top // factor), strip if transparent else None)
    return flat


def strips(width: int, height: int, factor: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the upper and lower edges of the strips into which a picture is cut."""
    step = max(1, _STRIP_PIXELS // width // factor) * factor
    for top in range(0, height, step):
        yield top, min(top + step, height)


def _to_bytes(image: Image.Image) -> _Step | None:
    """Return a step that scales samples of more than 8 bits, as `encode_image` says."""
    if image.mode.startswith("I;16"):
        return _from_16_bits(*_range(image))
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


def _range(image: Image.Image) -> tuple[int, int]:
    """Return the values of black and white in a picture of mode I;16.

    A TIFF may have 12 bits, and white may be 0.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits, photometric = tags.get(258), tags.get(262)
    white = 4095 if bits in (12, (12,)) else 65535
    return (white, 0) if photometric == 0 else (0, white)


def _from_16_bits(black: int, white: int) -> _Step:
    scale = 255 / (white - black)

    def to_bytes(strip: Image.Image) -> Image.Image:
        wide = strip.convert("I")  # some variants of I;16 convert to no other mode
        grey = _scaled(wide.convert("F"), scale, black)
        key = grey.info.pop("transparency", None)  # a PNG's transparent colour
        if isinstance(key, int):
            grey.putalpha(wide.point([255] * key + [0] + [255] * (65535 - key), "L"))
        return grey

    return to_bytes


def _scaled(strip: Image.Image, scale: float, offset: float) -> Image.Image:
    # Conversion to L cuts the fraction off; with half a step added, it rounds.
    return strip.point(lambda value: value * scale + (0.5 - offset * scale)).convert("L")


def _extrema(image: Image.Image) -> tuple[float, float]:
    """Return the least and the greatest value of a picture with one band."""
    cut = (image.crop((0, top, image.width, end)) for top, end in strips(*image.size))
    found = [cast("tuple[float, float]", strip.getextrema()) for strip in cut]
    return min(low for low, _ in found), max(high for _, high in found)


def _to_srgb(profile: bytes | None, mode: str) -> _Step | None:
    """Return a step from the colours of an ICC profile to sRGB; None if they are sRGB already.

    A profile counts as sRGB if it leaves some colours unchanged; its name is ignored.
    """
    if not profile:
        return None
    from PIL import ImageCms  # noqa: PLC0415 - few pictures need it

    kind = "L" if mode == "LA" else mode
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(
            source, target, kind, "RGBA" if kind == "RGBA" else "RGB"
        )
        if _changes_nothing(transform, kind):
            return None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode != "LA":
        return cast("_Step", transform.apply)

    def apply(strip: Image.Image) -> Image.Image:
        grey, alpha = strip.split()
        return Image.merge("LA", (transform.apply(grey).convert("L"), alpha))

    return apply


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Tell whether a transform leaves sample colours unchanged: greys, or a grid of RGB."""
    if mode not in ("L", "RGB", "RGBA"):
        return False
    levels = range(0, 256, 51)
    colours = bytes(
        itertools.chain.from_iterable(
            itertools.product(levels, repeat=3) if mode != "L" else ((x,) * 3 for x in levels)
        )
    )
    sample = Image.frombytes("RGB", (len(colours) // 3, 1), colours)
    found = transform.apply(sample.convert(mode)).convert("RGB")
    bands = cast("tuple[tuple[int, int], ...]", ImageChops.difference(sample, found).getextrema())
    return max(high for _, high in bands) <= _SAME
