"""A picture's bytes in, what can be measured in its pixels out.

Nothing here knows what a picture shows. Colours are measured on a small copy of the picture,
at most `GRID` cells wide or high, in which every cell has the name of a colour: enough to
find a red circle, and fast enough for every request.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import statistics

import msgspec
from PIL import Image, ImageFilter, ImageStat

from .validation import RefusedError, decode_image

GRID = 160

# What decoding a pixel costs, beside a JPEG's: a large JPEG is decoded at an eighth of its
# size, but for a progressive one. The formats are those in the API's documentation, and WebP.
_COSTS = {"JPEG": 1.0, "PNG": 2.0, "GIF": 2.0, "WEBP": 4.0}
_COST_OF_A_SCAN = 1 / 30
_MOST_PIXELS = 100_000_000  # of a JPEG: half a gigabyte and some seconds
_LONGEST_SIDE = 100_000

# A cell has the name of the nearest example. A name for a large part of the colour space
# has several examples.
_EXAMPLES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "black": ((0, 0, 0), (30, 30, 30)),
    "grey": ((70, 70, 70), (110, 110, 110), (150, 150, 150), (195, 195, 195)),
    "white": ((235, 235, 235), (255, 255, 255), (250, 245, 230)),
    "red": ((255, 0, 0), (200, 30, 30), (130, 0, 0), (230, 70, 60)),
    "orange": ((255, 140, 0), (240, 120, 40), (255, 165, 60)),
    "yellow": ((255, 255, 0), (255, 215, 0), (240, 230, 110)),
    "green": ((0, 255, 0), (0, 128, 0), (40, 160, 60), (120, 200, 110), (30, 80, 30)),
    "cyan": ((0, 255, 255), (0, 140, 140), (110, 220, 220)),
    "blue": ((0, 0, 255), (0, 0, 130), (40, 70, 210), (70, 130, 220), (135, 190, 240)),
    "purple": ((128, 0, 128), (150, 60, 200), (75, 0, 130)),
    "pink": ((255, 105, 180), (255, 182, 193), (255, 0, 255)),
    "brown": ((139, 69, 19), (100, 60, 30), (170, 120, 70)),
}
COLOURS = tuple(_EXAMPLES)
_PALETTE = Image.new("P", (1, 1))
_PALETTE.putpalette([part for colours in _EXAMPLES.values() for rgb in colours for part in rgb])
_COLOUR_OF_ENTRY = bytes(
    number for number, colours in enumerate(_EXAMPLES.values()) for _ in colours
).ljust(256, b"\0")

_SMALLEST_SHARE = 0.001  # of the picture; a smaller area is noise or an edge
_KEPT_PICTURES = 8  # whose measurements are kept, with their bytes: 80 MB at most
_UNEVEN = 8  # of 255: the least difference between a picture's brightest and darkest part

_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,  # of Pillow's reader of PNG
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # raised where warnings are errors
)


Place = tuple[float, float]
"""X and y, 0-1."""


class Area(msgspec.Struct, frozen=True):
    """Connected cells of one colour. Places are 0-1 of the picture."""

    colour: str
    share: float
    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    centre: Place
    """The mean of its cells."""
    outline: list[Place]
    """Down the right side and up the left one: exact for shapes without bays at the sides."""

    def holds(self, place: Place) -> bool:
        """Whether a place is in its box."""
        left, top, right, bottom = self.box
        return left <= place[0] <= right and top <= place[1] <= bottom


class Picture(msgspec.Struct, frozen=True):
    """The measurements of a picture."""

    format: str
    width: int
    height: int
    file_bytes: int
    brightness: float
    """The mean, 0 (black) to 1 (white)."""
    brightest: Place | None
    """The middle of the brightest part; None where all parts are equally bright."""
    darkest: Place
    shares: dict[str, float]
    """The share of each colour, 0-1, the largest first: the background's."""
    areas: list[Area]
    """All areas but specks and the background, the largest first."""
    named: Image.Image
    """The small copy; the value of a cell is the number of its colour in `COLOURS`."""

    @property
    def background(self) -> str:
        """The colour with the largest share."""
        return next(iter(self.shares))

    def colour_at(self, x: float, y: float) -> str:
        """Return the name of the colour at a place, 0-1."""
        columns, rows = self.named.size
        column, row = min(int(x * columns), columns - 1), min(int(y * rows), rows - 1)
        return COLOURS[self.named.tobytes()[row * columns + column]]


def look(image_url: str) -> Picture:
    """Decode a data URL and measure the picture in it. Blocks.

    Raises:
        RefusedError: The data URL is malformed, or doesn't hold a picture.
    """
    data = decode_image(image_url)
    try:
        return _measured(data)
    except _UNREADABLE as error:
        raise RefusedError("Invalid image data", param="image_url") from error


def measure(data: bytes) -> Picture:
    """Decode a picture and measure it. Blocks, for milliseconds to tenths of a second.

    A picture that can't be decoded to its last row, or whose decoding would cost too much
    time or memory, raises one of the errors in `_UNREADABLE`.
    """
    with Image.open(io.BytesIO(data), formats=tuple(_COSTS)) as opened:
        width, height = opened.size
        _check_cost(opened, data)
        # A JPEG decodes at a fraction of its size in a fraction of the time.
        opened.draft("RGB", (2 * GRID, 2 * GRID))
        image = opened.convert("RGB")
    scale = min(1.0, GRID / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    named = _name_colours(image.resize(size, Image.Resampling.NEAREST))
    counts = sorted((-count, number) for number, count in enumerate(named.histogram()) if count)
    light = image.convert("L").resize(size, Image.Resampling.BOX)
    coarse = light.resize((min(8, size[0]), min(6, size[1])), Image.Resampling.BOX)
    lights = coarse.tobytes()
    places = [
        ((column + 0.5) / coarse.width, (row + 0.5) / coarse.height)
        for row, column in itertools.product(range(coarse.height), range(coarse.width))
    ]
    dark, bright = min(lights), max(lights)
    return Picture(
        format=opened.format or "",
        width=width,
        height=height,
        file_bytes=len(data),
        brightness=ImageStat.Stat(light).mean[0] / 255,
        brightest=places[lights.index(bright)] if bright - dark >= _UNEVEN else None,
        darkest=places[lights.index(dark)],
        shares={COLOURS[number]: -count / math.prod(size) for count, number in counts},
        areas=_find_areas(named, background=counts[0][1]),
        named=named,
    )


_measured = functools.lru_cache(_KEPT_PICTURES)(measure)


def _check_cost(opened: Image.Image, data: bytes) -> None:
    """Refuse a picture before it is decoded, if decoding would cost too much."""
    width, height = opened.size
    cost = _COSTS[opened.format or "WEBP"]
    if opened.info.get("progressive"):
        cost = max(2.0, data.count(b"\xff\xda") * _COST_OF_A_SCAN)
    if width * height * cost > _MOST_PIXELS or max(width, height) > _LONGEST_SIDE:
        raise ValueError(f"too large a picture: {width}x{height}")


def _name_colours(small: Image.Image) -> Image.Image:
    """Return a copy in which the value of a pixel is the number of its colour in `COLOURS`."""
    nearest = small.quantize(palette=_PALETTE, dither=Image.Dither.NONE).tobytes()
    named = Image.frombytes("L", small.size, nearest.translate(_COLOUR_OF_ENTRY))
    # Where two colours meet, each cell takes the colour that most of its neighbours have, as
    # the median of two numbers is the more frequent one: specks and thin rims vanish. (A mode
    # filter has the right name, and takes four times as long.)
    return named.filter(ImageFilter.MedianFilter(3))


def _find_areas(named: Image.Image, background: int) -> list[Area]:
    """Return the areas of the other colours that are large enough, the largest first."""
    columns, rows = named.size
    left = {
        divmod(index, columns): colour
        for index, colour in enumerate(named.tobytes())
        if colour != background
    }
    found = []
    while left:
        cell, colour = left.popitem()
        cells = [cell]
        for row, column in cells:  # which grows meanwhile
            nears = (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)
            for near in nears:
                if left.get(near) == colour:
                    del left[near]
                    cells.append(near)
        if len(cells) >= _SMALLEST_SHARE * columns * rows:
            found.append((-len(cells), sorted(cells), colour))
    return [
        _measure_area(cells, COLOURS[colour], columns, rows) for _, cells, colour in sorted(found)
    ]


def _measure_area(cells: list[tuple[int, int]], colour: str, columns: int, rows: int) -> Area:
    left, right = [], []
    for row, group in itertools.groupby(cells, lambda cell: cell[0]):
        filled = [column for _, column in group]
        for y in (row / rows, (row + 1) / rows):
            left.append((filled[0] / columns, y))
            right.append(((filled[-1] + 1) / columns, y))
    centre_y, centre_x = (statistics.fmean(sides) + 0.5 for sides in zip(*cells, strict=True))
    return Area(
        colour=colour,
        share=len(cells) / (columns * rows),
        box=(min(left)[0], left[0][1], max(right)[0], left[-1][1]),
        centre=(centre_x / columns, centre_y / rows),
        outline=right + left[::-1],
    )
