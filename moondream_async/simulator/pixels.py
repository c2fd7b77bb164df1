"""A picture's bytes in, what can be measured in its pixels out.

Nothing here knows what a picture shows: it measures how large and how bright a picture
is, and where its colours lie. Colours are measured on a small copy of the picture, at
most `GRID` cells wide or high, in which every cell has the name of a colour: enough to
find a red circle, and fast enough for every request.

`measure` blocks, for milliseconds to tenths of a second: call it in a thread.
"""

from __future__ import annotations

import io
import math
import re

import msgspec
from PIL import Image, ImageFilter, ImageStat

GRID = 160

# The formats in the API's documentation, and WebP. The engine may accept more.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP")

# One picture costs at most half a gigabyte and some seconds. That is eight bytes a pixel, with
# WebP sixteen; large JPEGs are decoded at an eighth of their size, but for progressive ones.
_MOST_PIXELS = {"JPEG": 100_000_000, "PNG": 50_000_000, "GIF": 50_000_000, "WEBP": 25_000_000}
_MOST_PROGRESSIVE = 50_000_000
_MOST_SCANNED = 3_000_000_000  # pixels of a progressive JPEG, all scans together
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
_PALETTE.putpalette(
    [value for colours in _EXAMPLES.values() for colour in colours for value in colour]
)
_PALETTE_TO_COLOUR = bytes(
    number for number, colours in enumerate(_EXAMPLES.values()) for _ in colours
).ljust(256, b"\0")

_SMALLEST_SHARE = 0.001  # of the picture; a smaller area is noise or an edge


class UnreadablePictureError(ValueError):
    """The bytes are not a picture in a supported format."""


class Area(msgspec.Struct, frozen=True):
    """Connected cells of one colour."""

    colour: str
    share: float
    """Of the picture, 0-1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, 0-1."""
    centre: tuple[float, float]
    """The mean of its cells, x and y, 0-1."""
    outline: tuple[tuple[float, float], ...]
    """Down the right side and up the left one, 0-1: exact for shapes without bays at the sides."""

    def holds(self, x: float, y: float) -> bool:
        """Whether a place lies in the box."""
        left, top, right, bottom = self.box
        return left <= x <= right and top <= y <= bottom


class Picture(msgspec.Struct, frozen=True):
    """The measurements of a picture."""

    format: str
    width: int
    height: int
    file_bytes: int
    brightness: float
    """The mean, 0 (black) to 1 (white)."""
    brightest: tuple[float, float]
    """The middle of the brightest part, x and y, 0-1."""
    darkest: tuple[float, float]
    evenly_lit: bool
    shares: dict[str, float]
    """The share of each colour, 0-1, the largest first."""
    areas: tuple[Area, ...]
    """All areas but specks and the background, the largest first."""
    ground: Area
    """The whole picture, as an area of the background's colour."""
    columns: int
    rows: int
    cells: bytes
    """The number of each cell's colour in `COLOURS`, row by row."""

    @property
    def background(self) -> str:
        """The colour with the largest share."""
        return next(iter(self.shares))

    def colour_at(self, x: float, y: float) -> str:
        """Return the name of the colour at a place, 0-1."""
        column = min(int(x * self.columns), self.columns - 1)
        row = min(int(y * self.rows), self.rows - 1)
        return COLOURS[self.cells[row * self.columns + column]]


def measure(data: bytes) -> Picture:
    """Decode a picture and measure it.

    Raises:
        UnreadablePictureError: The picture can't be decoded to its last row, or decoding
            would cost too much time or memory.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            picture_format = opened.format or ""
            width, height = opened.size
            _check_cost(opened, data)
            # A JPEG decodes at a fraction of its size in a fraction of the time.
            opened.draft("RGB", (2 * GRID, 2 * GRID))
            opened.load()
            image = opened if opened.mode == "RGB" else opened.convert("RGB")
    except UnreadablePictureError:
        raise
    # SyntaxError is Pillow's PNG reader's. Bombs are warnings, and errors where warnings are.
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise UnreadablePictureError(f"not a readable picture: {error}") from error

    scale = min(1.0, GRID / max(image.size))
    columns, rows = (max(1, round(side * scale)) for side in image.size)
    # The nearest pixel, not the mean: a mean of red and white would be pink.
    small = image.resize((columns, rows), Image.Resampling.NEAREST)
    nearest = small.quantize(palette=_PALETTE, dither=Image.Dither.NONE)
    cells = nearest.tobytes().translate(_PALETTE_TO_COLOUR)
    # Where two colours meet, each cell takes the colour that most of its neighbours have, as
    # the median of two numbers is the more frequent one: specks and thin rims vanish. (A mode
    # filter has the right name, and takes four times as long.)
    names = Image.frombytes("L", (columns, rows), cells).filter(ImageFilter.MedianFilter(3))
    cells = names.tobytes()
    counts = sorted((-count, number) for number, count in enumerate(names.histogram()) if count)
    background = counts[0][1]
    ground = [(row, 0, columns, background) for row in range(rows)]
    light = image.convert("L").resize((columns, rows), Image.Resampling.BOX)
    coarse = light.resize((min(8, columns), min(6, rows)), Image.Resampling.BOX)
    lights = coarse.tobytes()
    darkest, brightest = min(lights), max(lights)
    return Picture(
        format=picture_format,
        width=width,
        height=height,
        file_bytes=len(data),
        brightness=ImageStat.Stat(light).mean[0] / 255,
        brightest=_find(brightest, lights, coarse.size),
        darkest=_find(darkest, lights, coarse.size),
        evenly_lit=brightest - darkest < 8,
        shares={COLOURS[number]: -count / len(cells) for count, number in counts},
        areas=tuple(_find_areas(cells, columns, rows, background)),
        ground=_describe_area(ground, columns, rows),
        columns=columns,
        rows=rows,
        cells=cells,
    )


def _find(value: int, lights: bytes, size: tuple[int, int]) -> tuple[float, float]:
    """Return the middle of the first pixel with this value, 0-1."""
    row, column = divmod(lights.index(value), size[0])
    return (column + 0.5) / size[0], (row + 0.5) / size[1]


def _check_cost(opened: Image.Image, data: bytes) -> None:
    """Refuse a picture before it is decoded, if decoding would cost too much."""
    width, height = opened.size
    most, scans = _MOST_PIXELS[opened.format or "WEBP"], 1
    if opened.info.get("progressive"):
        most, scans = _MOST_PROGRESSIVE, data.count(b"\xff\xda")
    if (
        width * height > most
        or max(width, height) > _LONGEST_SIDE
        or width * height * scans > _MOST_SCANNED
    ):
        raise UnreadablePictureError(f"too large a picture: {width}x{height}")


# A row's cells of one colour side by side: row, start, stop, and the colour's number.
_Run = tuple[int, int, int, int]
_SAME = re.compile(rb"(.)\1*", re.DOTALL)


def _find_areas(cells: bytes, columns: int, rows: int, background: int) -> list[Area]:
    areas: dict[int, list[_Run]] = {}
    for number, run in _find_runs(cells, columns, rows):
        if run[3] != background:
            areas.setdefault(number, []).append(run)
    smallest = max(1, math.ceil(len(cells) * _SMALLEST_SHARE))
    described = [
        _describe_area(runs, columns, rows)
        for runs in areas.values()
        if sum(stop - start for _, start, stop, _ in runs) >= smallest
    ]
    return sorted(described, key=lambda area: -area.share)


def _find_runs(cells: bytes, columns: int, rows: int) -> list[tuple[int, _Run]]:
    """Return all runs, row by row, each with the number of its area's first run."""
    runs: list[_Run] = []
    earlier: list[int] = []  # of each run, one of its area that was found before it, or itself

    def first(number: int) -> int:
        while earlier[number] != number:
            earlier[number] = number = earlier[earlier[number]]
        return number

    above: list[int] = []  # the number of the run that each cell of the row above is in
    for row in range(rows):
        here: list[int] = []
        for match in _SAME.finditer(cells, row * columns, (row + 1) * columns):
            number, colour, start = len(runs), match[0][0], len(here)
            here += [number] * len(match[0])
            runs.append((row, start, len(here), colour))
            earlier.append(number)
            for over in set(above[start : len(here)]):
                if runs[over][3] == colour:
                    one, other = sorted((first(over), first(number)))
                    earlier[other] = one
        above = here
    return [(first(number), run) for number, run in enumerate(runs)]


def _describe_area(found: list[_Run], columns: int, rows: int) -> Area:
    sides: dict[int, tuple[int, int]] = {}  # row: where its cells begin and end
    size = across = down = 0
    for row, start, stop, _ in found:
        sides[row] = (sides.get(row, (start,))[0], stop)
        size += stop - start
        across += (stop - start) * (start + stop)  # twice the sum of its cells' middles
        down += (stop - start) * row
    # Down the right side, and up the left one.
    corners = [(stop, row + edge) for row, (_, stop) in sides.items() for edge in (0, 1)]
    corners += [
        (start, row + edge) for row, (start, _) in reversed(sides.items()) for edge in (1, 0)
    ]
    across_all, down_all = zip(*corners, strict=True)
    return Area(
        colour=COLOURS[found[0][3]],
        share=size / (columns * rows),
        box=(
            min(across_all) / columns,
            min(down_all) / rows,
            max(across_all) / columns,
            max(down_all) / rows,
        ),
        centre=(across / size / 2 / columns, (down / size + 0.5) / rows),
        outline=tuple((x / columns, y / rows) for x, y in corners),
    )
