"""A picture's bytes in, what can be measured in its pixels out.

Nothing here knows what a picture shows. It knows how large and how bright it
is, and where its colours lie. That is done on a small copy of the picture, at
most `GRID` cells wide or high, in which every cell has the name of a colour:
enough to find a red circle, and fast enough to do for every request.

Everything blocks, for milliseconds to tenths of a second: call it in a thread.
"""

from __future__ import annotations

import io
import math
import re

import msgspec
from PIL import Image, ImageFilter

GRID = 160

# What the docs name, and WebP. The engine's own list may be longer.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP")

# One picture costs at most half a gigabyte and some seconds. That is eight bytes a pixel, with
# WebP sixteen; large JPEGs are decoded at an eighth of their size, but for progressive ones.
_MOST_PIXELS = {"JPEG": 100_000_000, "PNG": 50_000_000, "GIF": 50_000_000, "WEBP": 25_000_000}
_MOST_PROGRESSIVE = 50_000_000
_MOST_SCANNED = 3_000_000_000  # pixels of a progressive JPEG, all scans together
_LONGEST_SIDE = 100_000

# A cell has the name of the colour nearest to it, so a name that spans much of
# the colour space stands here with several examples.
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

_SMALLEST_SHARE = 0.001  # of the picture; what is smaller is noise or an edge


class UnreadablePictureError(ValueError):
    """The bytes are no picture, or none of a supported format."""


class Area(msgspec.Struct, frozen=True):
    """Cells of one colour that hang together."""

    colour: str
    share: float
    """Of the picture, 0-1."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, 0-1."""
    centre: tuple[float, float]
    """The mean of its cells, x and y, 0-1."""
    outline: tuple[tuple[float, float], ...]
    """Down the right side and up the left one, 0-1: exact for shapes without bays at the sides."""


class Picture(msgspec.Struct, frozen=True):
    """What was measured in a picture."""

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
    """How much of the picture has which colour, 0-1, the largest share first."""
    areas: tuple[Area, ...]
    """All coloured areas of more than a speck, the largest first; without the background."""
    columns: int
    rows: int
    cells: bytes
    """The number of each cell's colour in `COLOURS`, row by row."""

    @property
    def background(self) -> str:
        """The colour that covers most."""
        return next(iter(self.shares))

    @property
    def ground(self) -> Area:
        """All of the picture, as an area of the background's colour."""
        return Area(
            colour=self.background,
            share=self.shares[self.background],
            box=(0.0, 0.0, 1.0, 1.0),
            centre=(0.5, 0.5),
            outline=((1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)),
        )

    def colour_at(self, x: float, y: float) -> str:
        """Return the name of the colour at a place, 0-1."""
        column = min(int(x * self.columns), self.columns - 1)
        row = min(int(y * self.rows), self.rows - 1)
        return COLOURS[self.cells[row * self.columns + column]]


def measure(data: bytes) -> Picture:
    """Decode a picture and measure it.

    Raises:
        UnreadablePictureError: It can't be decoded, to the last row of pixels, or that
            would cost too much.
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
    except (
        OSError,
        ValueError,
        SyntaxError,  # Pillow's PNG reader
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,  # where warnings are errors
    ) as error:
        raise UnreadablePictureError(f"not a readable picture: {error}") from error

    scale = min(1.0, GRID / max(image.size))
    columns, rows = (max(1, round(side * scale)) for side in image.size)
    # The nearest pixel, not the mean: a mean of red and white would be pink.
    small = image.resize((columns, rows), Image.Resampling.NEAREST)
    nearest = small.quantize(palette=_PALETTE, dither=Image.Dither.NONE)
    cells = nearest.tobytes().translate(_PALETTE_TO_COLOUR)
    # Where two colours meet, each cell takes the one that most of its neighbours have, as
    # the median of two numbers is the more frequent one: specks and thin rims vanish. (A mode
    # filter says that in its name, and takes four times as long.)
    names = Image.frombytes("L", (columns, rows), cells)
    cells = names.filter(ImageFilter.MedianFilter(3)).tobytes()
    shares = {
        COLOURS[number]: count / len(cells)
        for number, count in sorted(
            ((number, cells.count(number)) for number in set(cells)),
            key=lambda pair: (-pair[1], pair[0]),
        )
    }
    background = COLOURS.index(next(iter(shares)))
    light = image.convert("L").resize((columns, rows), Image.Resampling.BOX)
    coarse = light.resize((min(8, columns), min(6, rows)), Image.Resampling.BOX)
    brightnesses = coarse.tobytes()
    return Picture(
        format=picture_format,
        width=width,
        height=height,
        file_bytes=len(data),
        brightness=sum(light.tobytes()) / len(cells) / 255,
        brightest=_middle_of_cell(brightnesses.index(max(brightnesses)), coarse.size),
        darkest=_middle_of_cell(brightnesses.index(min(brightnesses)), coarse.size),
        evenly_lit=max(brightnesses) - min(brightnesses) < 8,
        shares=shares,
        areas=tuple(_find_areas(cells, columns, rows, background)),
        columns=columns,
        rows=rows,
        cells=cells,
    )


def _check_cost(opened: Image.Image, data: bytes) -> None:
    """Refuse what would cost too much, before it is decoded."""
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


def _middle_of_cell(number: int, size: tuple[int, int]) -> tuple[float, float]:
    row, column = divmod(number, size[0])
    return (column + 0.5) / size[0], (row + 0.5) / size[1]


class _Run(msgspec.Struct, gc=False):
    """Cells of one colour side by side in a row."""

    row: int
    start: int
    stop: int
    colour: int
    earlier: _Run | None = None
    """One of the same area that was found before it."""

    def first(self) -> _Run:
        """Return the first run of its area."""
        run = self
        while run.earlier is not None:
            run = run.earlier
        if run is not self:
            self.earlier = run  # the next who asks has a shorter way
        return run


_SAME = re.compile(rb"(.)\1*", re.DOTALL)


def _find_areas(cells: bytes, columns: int, rows: int, background: int) -> list[Area]:
    areas: dict[int, list[_Run]] = {}
    for run in _find_runs(cells, columns, rows):
        if run.colour != background:
            areas.setdefault(id(run.first()), []).append(run)
    smallest = max(1, math.ceil(len(cells) * _SMALLEST_SHARE))
    described = [
        _describe_area(runs, columns, rows)
        for runs in areas.values()
        if sum(run.stop - run.start for run in runs) >= smallest
    ]
    return sorted(described, key=lambda area: -area.share)


def _find_runs(cells: bytes, columns: int, rows: int) -> list[_Run]:
    """Return all runs, row by row, each tied to those of its colour that it touches above."""
    found: list[_Run] = []
    above: list[_Run] = []
    for row in range(rows):
        at = row * columns
        here = [
            _Run(row, match.start() - at, match.end() - at, match[0][0])
            for match in _SAME.finditer(cells, at, at + columns)
        ]
        upper = 0
        for run in here if above else ():
            stop = 0
            while stop < run.stop:
                over = above[upper]
                if over.colour == run.colour:
                    _tie(over.first(), run.first())
                stop = over.stop
                upper += stop <= run.stop  # else it is over the next one, too
        found += here
        above = here
    return found


def _tie(one: _Run, other: _Run) -> None:
    if one is not other:
        earlier, later = sorted((one, other), key=lambda run: (run.row, run.start))
        later.earlier = earlier


def _describe_area(found: list[_Run], columns: int, rows: int) -> Area:
    sides: dict[int, tuple[int, int]] = {}  # row: where its cells begin and end
    size = across = down = 0
    for run in found:
        sides[run.row] = (sides.get(run.row, (run.start,))[0], run.stop)
        width = run.stop - run.start
        size += width
        across += width * (run.start + run.stop)  # twice the sum of its cells' middles
        down += width * run.row
    right = [
        (stop / columns, (row + edge) / rows) for row, (_, stop) in sides.items() for edge in (0, 1)
    ]
    left = [
        (start / columns, (row + edge) / rows)
        for row, (start, _) in reversed(sides.items())
        for edge in (1, 0)
    ]
    return Area(
        colour=COLOURS[found[0].colour],
        share=size / (columns * rows),
        box=(
            min(start for start, _ in sides.values()) / columns,
            min(sides) / rows,
            max(stop for _, stop in sides.values()) / columns,
            (max(sides) + 1) / rows,
        ),
        centre=(across / size / 2 / columns, (down / size + 0.5) / rows),
        outline=tuple(right + left),
    )
