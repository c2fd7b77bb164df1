"""Results drawn over their picture. Loads Pillow, and for outlines `svg.path`.

All marks are drawn on one transparent sheet, which is then laid over the picture. For a
small picture the sheet is several times as large, so that lines and text get soft edges. A
picture over the sheet's largest size is drawn on directly. The memory is one copy of the
picture, which is the result, and at most 150 MB.

SVG paths are read by `svg.path`, of the extra ``draw``: it is small, pure Python, typed,
MIT-licensed and still released. (`svgelements` has had no release since 2023, `svgpathtools`
brings SciPy, `fonttools` and `skia-python` are many times the size.)

A server may send any number of marks, so the numbers have limits, each far beyond what a
picture can show. Drawing takes a few seconds at most.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont

from ._checks import check_count, check_positive
from ._images import decode_image
from ._images.header import MAX_PIXELS
from .errors import MoondreamError, RequestError
from .results import (
    DetectResult,
    PointResult,
    QueryResult,
    Reasoning,
    Region,
    Result,
    SegmentResult,
)

Place = tuple[float, float]
Outline = tuple[Place, ...]
Segment = Any  # svg.path's; their common class lacks attributes that all of them have

# Easy to tell apart, and rare in photos.
_COLOURS = ("#00c2ff", "#ff2e88", "#ffb000", "#7c4dff", "#18d860", "#ff6b1a", "#ffe83d", "#00a88f")
_PREVIEW = (800, 800)  # pixels at most, in a notebook
_SHADE = (0, 0, 0, 110)  # around lines and dots, so that they show on their own colour
_OPACITY = 0.35  # of the inside of an outline
_SHEET_PIXELS = 16_000_000  # of four bytes: 64 MB at most, unless the picture itself has more
_FINEST = 4  # the sheet's width, in widths of the picture, at most
_CROWD = 300  # with more marks and outlines, none gets soft edges
_CROWD_LINE = 3  # pixels, the widest line of so many marks: wider ones take long and hide others
_CURVE_STEPS = 32  # straight lines in place of a curve; a path has many curves, each short
_MASK_PIXELS = 100_000_000  # the most that is filled for a mask's exact rim, under a second
_STRIP_PIXELS = 4_000_000  # of a mask that is filled at once
_MOST_MARKS = 10_000
_MOST_LETTERS = 100  # of a label
_MOST_PATH = 500_000  # characters
_MOST_CORNERS = 10_000  # of all outlines together
_MOST_FILLED = 4_000_000_000  # pixels of the boxes around all outlines together


class _Mark(NamedTuple):
    """Shapes with one colour and one label. Places are 0-1 of the picture."""

    box: Region | None = None
    outlines: tuple[Outline, ...] = ()
    """Drawn in place of the box."""
    points: tuple[Place, ...] = ()
    words: str = ""
    """The label, where the caller gives none."""


def draw(
    result: Result,
    image: Any,
    *,
    labels: str | Sequence[str] | None = None,
    line_width: float | None = None,
) -> Image.Image:
    """Draw what was found over a copy of its picture; see the results' own ``draw``."""
    marks = _marks(result)
    texts = _texts(marks, labels)
    crowd = sum(len(mark.points) + max(1, len(mark.outlines)) for mark in marks)
    if crowd > _MOST_MARKS:
        raise RequestError(f"{crowd:,} marks are too many to be drawn: at most {_MOST_MARKS:,}")
    picture = decode_image(image).convert("RGB")
    if line_width is None:
        line_width = max(1.5, math.sqrt(picture.width * picture.height) / 170)
        corners = sum(len(outline) for mark in marks for outline in mark.outlines)
        if crowd > _CROWD or corners > 10 * _CROWD:
            line_width = min(line_width, _CROWD_LINE)
    else:
        check_positive("line_width", line_width, "a positive number of pixels")
    sheet = _Sheet(picture, line_width, fine=crowd <= _CROWD)
    colours = itertools.cycle(_COLOURS)
    painted = list(zip(marks, texts, colours, strict=False))
    for mark, _, colour in painted:
        sheet.add(mark, colour)
    for mark, text, colour in painted:  # over all the lines
        sheet.write(mark, text, colour)
    sheet.lay_over()
    return picture


def preview(result: Result, image: Any) -> bytes | None:
    """Return a small PNG for a notebook; None where the result can't be drawn."""
    try:
        picture = draw(result, image)
    except (MoondreamError, ImportError, OSError):
        return None
    picture.thumbnail(_PREVIEW)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def mask(path: str, bbox: Region | None, size: tuple[int, int]) -> Image.Image:
    """Return the inside of an outline; see `SegmentResult.to_mask`."""
    for name, side in zip(("width", "height"), size, strict=True):
        check_count(name, side)
    width, height = size
    if width * height > MAX_PIXELS:
        raise RequestError(f"A mask has at most {MAX_PIXELS:,} pixels, not {width:,} x {height:,}")
    if not path.strip():
        return Image.new("1", size)  # nothing was found
    if bbox is None:
        raise RequestError("The outline has no place: the server gave no bbox with it")
    outlines = _outlines(_placed(path, bbox))
    # Pillow fills every pixel that an outline touches. At three times the size, the middle one
    # of three by three pixels tells whether the middle of a pixel is inside.
    fine = 3 if 9 * width * height * max(1, len(outlines)) <= _MASK_PIXELS else 1
    width, height = width * fine, height * fine
    places = [[(x * width, y * height) for x, y in outline] for outline in outlines]
    _check_filled(places, (width, height))
    return _inside(places, (width, height)).resize(size, Image.Resampling.NEAREST)


def whole_path(path: str, bbox: Region) -> str:
    """Return a path whose coordinates are 0-1 of the picture; see `SegmentResult.whole_path`."""
    if not path.strip():
        return ""  # nothing was found
    segments = _placed(path, bbox)
    from svg.path import Path  # noqa: PLC0415 - an extra, which was there

    return Path(*segments).d()


def _marks(result: Result) -> list[_Mark]:
    if isinstance(result, DetectResult):
        return [_Mark(box=box) for box in result.objects]
    if isinstance(result, PointResult):
        return [_Mark(points=((point.x, point.y),)) for point in result.points]
    if isinstance(result, SegmentResult):
        return _outline_marks(result)
    if isinstance(result, QueryResult):
        return [] if result.reasoning is None else _grounding_marks(result.reasoning)
    raise RequestError(f"a {type(result).__name__} has no places to draw")


def _outline_marks(result: SegmentResult) -> list[_Mark]:
    if not result.path.strip():
        return []  # nothing was found
    box = result.bbox
    if box is None:
        raise RequestError("The outline has no place: the server gave no bbox with it")
    return [_Mark(box, _outlines(_placed(result.path, box)))]


def _grounding_marks(reasoning: Reasoning) -> list[_Mark]:
    return [
        _Mark(
            points=tuple((point[0], point[1]) for point in span.points if len(point) > 1),
            words=reasoning.text[span.start_idx : span.end_idx].strip(),
        )
        for span in reasoning.grounding
    ]


def _texts(marks: list[_Mark], labels: str | Sequence[str] | None) -> list[str]:
    if labels is None:
        return [mark.words for mark in marks]
    if isinstance(labels, str):
        return [labels] * len(marks)
    texts = list(labels)
    if len(texts) != len(marks) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"labels must be one string, or {len(marks)}: one for each mark")
    return texts


# -- the sheet ------------------------------------------------------------------------


class _Sheet:
    """The sheet of marks. Its methods take places in 0-1, whatever its size in pixels."""

    def __init__(self, picture: Image.Image, line_width: float, *, fine: bool) -> None:
        room = _SHEET_PIXELS / (picture.width * picture.height)
        self._fineness = max(1, min(_FINEST, int(math.sqrt(room)))) if fine else 1
        self._width, self._height = (side * self._fineness for side in picture.size)
        self._picture = picture
        size = (self._width, self._height)
        self._image = picture if room < 1 else Image.new("RGBA", size)
        self._shade = _SHADE if room >= 1 else _SHADE[:3]  # to mix colours takes long
        self._pen = ImageDraw.Draw(self._image)
        self._line = line_width * self._fineness
        self._font = ImageFont.load_default(max(5 * self._line, 11 * self._fineness))

    def add(self, mark: _Mark, colour: str) -> None:
        """Draw the shapes of a mark."""
        if mark.outlines:
            outlines = [list(map(self._to_pixels, outline)) for outline in mark.outlines]
            self._fill(outlines, colour)
            for outline in outlines:
                self._trace(outline, colour)
        elif mark.box is not None:
            # Moved inside, so that a line on the picture's edge is visible in its whole width.
            x0, y0, x1, y1 = mark.box.to_pixels(self._width, self._height)
            inset = self._line / 2
            x0, x1 = (max(inset, min(x, self._width - inset)) for x in (x0, x1))
            y0, y1 = (max(inset, min(y, self._height - inset)) for y in (y0, y1))
            self._trace([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)
        for x, y in map(self._to_pixels, mark.points):
            self._disc(x, y, 3.6 * self._line, self._shade)
            self._disc(x, y, 3 * self._line, "white")
            self._disc(x, y, 2.2 * self._line, colour)

    def write(self, mark: _Mark, text: str, colour: str) -> None:
        """Write the label of a mark, on one line."""
        text = " ".join(text[: 10 * _MOST_LETTERS].split())
        if not text:
            return
        if len(text) > _MOST_LETTERS:
            text = text[: _MOST_LETTERS - 1] + "…"
        gap = self._line
        _, high_letter, _, low_letter = self._pen.textbbox((0, 0), "Ág", self._font)
        wide = self._pen.textlength(text, self._font) + 3 * gap
        high = low_letter - high_letter + 2 * gap
        ink = "black" if _is_light(colour) else "white"
        for x, y in self._spots(mark, wide, high):
            left = max(0, min(x, self._width - wide))
            top = max(0, min(y, self._height - high))
            self._pen.rounded_rectangle((left, top, left + wide, top + high), gap, fill=colour)
            self._pen.text((left + 1.5 * gap, top + gap - high_letter), text, ink, self._font)

    def _spots(self, mark: _Mark, wide: float, high: float) -> Iterator[Place]:
        """Yield the upper left corners of a mark's labels: on top of it, below it, or beside it."""
        gap = self._line
        if mark.box is not None:
            left, top, right, bottom = mark.box.to_pixels(self._width, self._height)
            if mark.outlines:  # an outline seldom reaches into the box's corner
                left = (left + right - wide) / 2
            above, below = top - gap / 2 - high, bottom + gap / 2
            yield left - gap / 2, below if above < 0 and below + high <= self._height else above
        for x, y in map(self._to_pixels, mark.points):
            beside = x + 4 * gap
            fits = beside + wide <= self._width
            yield beside if fits else x - 4 * gap - wide, y - high / 2

    def lay_over(self) -> None:
        """Lay the sheet over its picture."""
        if self._image is self._picture:
            return
        sheet = self._image if self._fineness == 1 else self._image.reduce(self._fineness)
        self._picture.paste(sheet, (0, 0), sheet)

    def _to_pixels(self, place: Place) -> Place:
        return place[0] * self._width, place[1] * self._height

    def _trace(self, corners: list[Place], colour: str) -> None:
        """Draw a closed line, with a shade on both sides."""
        ring = [*corners, *corners[:2]]  # the first side twice, so that the last joint is round
        for fill, width in ((self._shade, 1.7 * self._line), (colour, self._line)):
            self._pen.line(ring, fill, max(1, round(width)), joint="curve")

    def _fill(self, outlines: list[list[Place]], colour: str) -> None:
        """Tint the inside of outlines."""
        _check_filled(outlines, self._image.size)
        rgb = ImageColor.getrgb(colour)[:3]
        opacity = round(255 * _OPACITY)
        rows = max(1, _STRIP_PIXELS // self._width)
        for top in range(0, self._height, rows):  # a mask of the whole sheet takes much memory
            strip = [[(x, y - top) for x, y in outline] for outline in outlines]
            inside = _inside(strip, (self._width, min(rows, self._height - top)))
            if self._image is self._picture:
                self._image.paste(rgb, (0, top), inside.convert("L").point([0] * 255 + [opacity]))
            else:
                self._image.paste((*rgb, opacity), (0, top), inside)

    def _disc(self, x: float, y: float, radius: float, colour: str | tuple[int, ...]) -> None:
        self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _inside(outlines: list[list[Place]], size: tuple[int, int]) -> Image.Image:
    """Return a mask of the inside, by SVG's nonzero rule: the outlines' windings are not 0.

    An outline within another one, drawn in the other direction, is a hole. The windings of all
    pixels are counted in a picture of one byte each.
    """
    boxes = [_box_around(outline, size) for outline in outlines]
    winding = Image.new("L", size)
    for outline, box in zip(outlines, boxes, strict=True):
        left, top, right, bottom = box
        once = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(once).polygon([(x - left, y - top) for x, y in outline], fill=1)
        count = ImageChops.add_modulo if _is_clockwise(outline) else ImageChops.subtract_modulo
        winding.paste(count(winding.crop(box), once), box)
    return winding.point([0] + [255] * 255, "1")


def _check_filled(outlines: list[list[Place]], size: tuple[int, int]) -> None:
    boxes = [_box_around(outline, size) for outline in outlines]
    if sum((right - left) * (low - top) for left, top, right, low in boxes) > _MOST_FILLED:
        raise RequestError("The outline has too many parts to be drawn")


def _box_around(outline: list[Place], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the box of an outline within a picture, in whole pixels."""
    across, down = zip(*outline, strict=True)
    left, right = (max(0, min(size[0], x)) for x in (min(across) - 1, max(across) + 2))
    top, bottom = (max(0, min(size[1], y)) for y in (min(down) - 1, max(down) + 2))
    left, top = min(int(left), size[0] - 1), min(int(top), size[1] - 1)
    return left, top, max(math.ceil(right), left + 1), max(math.ceil(bottom), top + 1)


def _is_light(colour: str) -> bool:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def _is_clockwise(outline: list[Place]) -> bool:
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise([*outline, outline[0]]):
        area += x0 * y1 - x1 * y0
    return area > 0


# -- paths ----------------------------------------------------------------------------


def _placed(path: str, bbox: Region) -> list[Segment]:
    """Read a path that is relative to `bbox`; return it relative to the picture."""
    width, height = bbox.x_max - bbox.x_min, bbox.y_max - bbox.y_min
    try:
        segments = _read(path)
        for segment in segments:
            for name in ("start", "control", "control1", "control2", "end"):
                if hasattr(segment, name):
                    point = getattr(segment, name)
                    x, y = bbox.x_min + point.real * width, bbox.y_min + point.imag * height
                    setattr(segment, name, complex(_finite(x), _finite(y)))
    except RequestError:
        raise  # it is a ValueError too
    except (ValueError, IndexError, ArithmeticError) as error:
        raise RequestError(f"The outline is no SVG path, {path!r:.80}: {error}") from error
    return segments


def _read(path: str) -> list[Segment]:
    """Read a path; arcs become short lines, since `svg.path` can't stretch arcs."""
    try:
        from svg.path import Arc, Line, parse_path  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ImportError("Outlines need an extra: pip install 'moondream-async[draw]'") from error

    if len(path) > _MOST_PATH:
        raise RequestError(f"The outline is {len(path):,} characters long, too many to be drawn")
    if path.lstrip()[:1] not in ("M", "m"):
        raise ValueError("it does not begin with M")
    segments: list[Segment] = []
    steps = _steps(path.count("A") + path.count("a"))
    for segment in parse_path(path):
        if isinstance(segment, Arc):
            segments += itertools.starmap(Line, itertools.pairwise(_points(segment, steps)))
        else:
            segments.append(segment)
    return segments


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("it leads to infinity")
    return value


def _outlines(segments: list[Segment]) -> tuple[Outline, ...]:
    """Return the closed lines of a path; curves become short straight lines."""
    from svg.path import Close, Line, Move  # noqa: PLC0415 - an extra, which was there

    if len(segments) > _MOST_CORNERS:
        raise RequestError(f"The outline has {len(segments):,} parts, too many to be drawn")
    steps = _steps(len(segments))
    outlines: list[list[complex]] = []
    closed = True
    for segment in segments:
        if closed or isinstance(segment, Move):
            outlines.append([segment.start])
        straight = isinstance(segment, (Move, Line, Close))
        outlines[-1] += [segment.end] if straight else _points(segment, steps)[1:]
        closed = isinstance(segment, Close)
    return tuple(
        tuple((point.real, point.imag) for point in outline)
        for outline in outlines
        if len(outline) > 2
    )


def _steps(curves: int) -> int:
    """Return how many straight lines a curve becomes: fewer in a path of many curves."""
    return max(1, min(_CURVE_STEPS, _MOST_CORNERS // (2 * max(1, curves))))


def _points(segment: Segment, steps: int) -> list[complex]:
    return [segment.point(step / steps) for step in range(steps + 1)]
