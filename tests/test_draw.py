"""Results drawn over their picture: looked at by their pixels."""

import asyncio
import contextlib
import io
import os
import re
import resource
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageColor

import moondream_async as md
from moondream_async._draw import _COLOURS, _OPACITY, draw

WHITE = (255, 255, 255)
FIRST, SECOND = map(ImageColor.getrgb, _COLOURS[:2])
TINTED = tuple(round(255 * (1 - _OPACITY) + value * _OPACITY) for value in FIRST)

WHOLE = md.Region(0, 0, 1, 1)
BOX = md.Region(0.25, 0.2, 0.75, 0.8)  # of 200x100 pixels: 50, 20, 150, 80
SQUARE = "M 0 0 L 1 0 L 1 1 L 0 1 Z"
FORWARD = "M 0.25 0.25 L 0.75 0.25 L 0.75 0.75 L 0.25 0.75 Z"
BACKWARD = "M 0.25 0.25 L 0.25 0.75 L 0.75 0.75 L 0.75 0.25 Z"
CIRCLES = {
    "arcs": "M 0.5 0 A 0.5 0.5 0 1 1 0.5 1 A 0.5 0.5 0 1 1 0.5 0 Z",
    "cubic": "M 0.5 0 C 0.776 0 1 0.224 1 0.5 S 0.776 1 0.5 1 S 0 0.776 0 0.5 S 0.224 0 0.5 0 Z",
    "relative": "m .5 0 c .276 0 .5 .224 .5 .5 s-.224 .5-.5 .5 s-.5-.224-.5-.5 s .224-.5 .5-.5 z",
}


@pytest.fixture
def sheet():
    return Image.new("RGB", (200, 100), "white")


def detected(*boxes):
    return md.DetectResult(objects=boxes)


def pointed(*places):
    return md.PointResult(points=tuple(md.Point(*place) for place in places))


def outlined(path, bbox=BOX):
    return md.SegmentResult(path=path, bbox=bbox)


def thought(text, *spans):
    grounding = tuple(md.Grounding(start, end, points) for start, end, points in spans)
    return md.QueryResult(answer="", reasoning=md.Reasoning(text, grounding))


def changed(before, after):
    """Return where two pictures differ: left, top, right, bottom; None if nowhere."""
    return ImageChops.difference(before, after).getbbox()


def is_near(pixel, colour):
    return all(abs(one - other) <= 2 for one, other in zip(pixel, colour, strict=True))


# -- shapes ---------------------------------------------------------------------------


def test_box_is_drawn_on_its_edges_and_nowhere_else(sheet):
    drawn = detected(BOX).draw(sheet, line_width=3)
    for edge in [(50, 50), (150, 50), (100, 20), (100, 80)]:
        assert drawn.getpixel(edge) == FIRST
    assert changed(sheet, drawn) == (47, 17, 153, 83)
    inside = (55, 25, 145, 75)
    assert changed(sheet.crop(inside), drawn.crop(inside)) is None
    drawn = detected(WHOLE).draw(sheet, line_width=4)  # is seen whole at the rim
    for edge in [(0, 50), (2, 50), (199, 50), (100, 1), (100, 98)]:
        assert is_near(drawn.getpixel(edge), FIRST)
    assert drawn.getpixel((100, 50)) == WHITE


def test_point_is_a_dot_of_its_colour_with_a_rim(sheet):
    drawn = pointed((0.5, 0.5)).draw(sheet, line_width=3)
    assert drawn.getpixel((100, 50)) == FIRST
    assert drawn.getpixel((108, 50)) == WHITE
    left, top, right, bottom = changed(sheet, drawn)
    assert (left + right, top + bottom) == (200, 100)
    assert right - left == bottom - top < 30


def test_outline_lies_in_its_box_and_tints_what_is_inside_but_for_its_holes(sheet):
    drawn = outlined(SQUARE).draw(sheet, line_width=3)
    assert drawn.getpixel((50, 50)) == FIRST
    assert is_near(drawn.getpixel((100, 50)), TINTED)
    assert drawn.getpixel((40, 50)) == drawn.getpixel((100, 10)) == WHITE
    drawn = outlined(f"{SQUARE} {BACKWARD}").draw(sheet, line_width=2)
    assert is_near(drawn.getpixel((62, 50)), TINTED)
    assert drawn.getpixel((100, 50)) == WHITE


def test_each_object_has_a_colour_of_its_own(sheet):
    boxes = [md.Region(0.1 * n, 0.4, 0.1 * n + 0.05, 0.6) for n in range(8)]
    drawn = detected(*boxes).draw(sheet, line_width=3)
    found = [drawn.getpixel((round(20 * n) + 1, 50)) for n in range(8)]
    assert len(set(found)) == 8
    many = detected(*[BOX] * 30).draw(sheet)
    assert changed(sheet, many)


def test_reasoning_is_drawn_where_it_looks_with_its_own_words(sheet):
    result = thought(
        "A heron, two boats.", (2, 7, ((0.2, 0.5),)), (9, 18, ((0.4, 0.5), (0.6, 0.5)))
    )
    drawn = result.draw(sheet, labels="", line_width=2)
    assert drawn.getpixel((40, 50)) == FIRST
    assert drawn.getpixel((80, 50)) == drawn.getpixel((120, 50)) == SECOND
    assert result.draw(sheet, line_width=2) == result.draw(
        sheet, labels=["heron", "two boats"], line_width=2
    )
    assert md.QueryResult(answer="No thoughts.").draw(sheet) == sheet


def test_nothing_found_is_the_picture_as_it_was(sheet):
    for nothing in (detected(), pointed(), outlined(""), outlined("", None), thought("Nothing.")):
        drawn = nothing.draw(sheet)
        assert drawn == sheet
        assert drawn is not sheet


def test_line_suits_the_size_of_the_picture():
    def width(size):
        sheet = Image.new("RGB", size, "white")
        drawn = detected(md.Region(0.25, 0.25, 0.75, 0.75)).draw(sheet)
        return sum(drawn.getpixel((x, size[1] // 2)) == FIRST for x in range(size[0] // 2))

    assert 2 <= width((640, 480)) <= 4
    assert width((3200, 2400)) == pytest.approx(5 * 3.3, abs=1)


# -- labels ---------------------------------------------------------------------------


def test_label_stands_on_its_box_in_its_colour(sheet):
    box = md.Region(0.25, 0.4, 0.75, 0.8)
    plain = detected(box).draw(sheet, line_width=2)
    labelled = detected(box).draw(sheet, labels="heron", line_width=2)
    left, top, right, bottom = changed(plain, labelled)
    assert 47 <= left <= 50
    assert 10 < top < bottom <= 41
    assert 70 < right < 120
    assert labelled.getpixel((left + 1, top + 4)) == FIRST
    high = detected(md.Region(0.25, 0, 0.75, 0.5))  # which has no room above it
    plain, labelled = (high.draw(sheet, labels=each, line_width=2) for each in ("", "heron"))
    assert changed(plain, labelled)[1] >= 50


def test_label_stays_within_the_picture(sheet):
    long = "a heron in shallow water, and much more"
    for place in ((0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.5)):
        plain = pointed(place).draw(sheet, line_width=1)
        short = pointed(place).draw(sheet, labels="heron", line_width=1)
        left, top, right, bottom = changed(plain, short)
        assert right - left > 25
        assert bottom - top > 10
        assert changed(plain, pointed(place).draw(sheet, labels=long))


def test_labels_are_one_for_all_or_one_for_each(sheet):
    result = detected(md.Region(0.1, 0.4, 0.4, 0.8), md.Region(0.6, 0.4, 0.9, 0.8))
    same = result.draw(sheet, labels="heron")
    assert same == result.draw(sheet, labels=["heron", "heron"])
    assert same != result.draw(sheet, labels=["heron", "stork"])
    assert result.draw(sheet, labels=["", ""]) == result.draw(sheet)


def test_label_is_one_line_and_a_long_one_is_cut(sheet):
    result = thought("A tall\n\theron.", (2, 13, ((0.2, 0.5),)))
    assert result.draw(sheet) == result.draw(sheet, labels="tall heron")
    assert result.draw(sheet, labels=" \n") == result.draw(sheet, labels="")
    cut = detected(BOX).draw(sheet, labels="i" * 99 + "…")
    assert detected(BOX).draw(sheet, labels="i" * 200) == cut


def test_labels_and_widths_that_do_not_fit_are_refused(sheet):
    for labels in (["one"], ["one", "two", "three"], [], ["one", 2]):
        with pytest.raises(md.RequestError, match="labels must be one string, or 2"):
            detected(BOX, BOX).draw(sheet, labels=labels)
    for width in (0, -1, float("nan"), float("inf"), "3"):
        with pytest.raises(md.RequestError, match="line_width"):
            detected(BOX).draw(sheet, line_width=width)


# -- pictures -------------------------------------------------------------------------


def as_pillow(photo):
    with Image.open(photo) as image:
        image.load()
    return image


async def test_picture_may_come_in_any_form_and_is_left_as_it_is(photo):
    data, pillow = photo.read_bytes(), as_pillow(photo)
    expected = await asyncio.to_thread(detected(BOX).draw, pillow)
    assert expected.size == (640, 480)
    prepared = md.EncodedImage(data, "image/jpeg", 640, 480)
    for image in (str(photo), photo, data, io.BytesIO(data), prepared):
        assert detected(BOX).draw(image) == expected
    assert pillow == as_pillow(photo)


def test_places_are_those_of_the_upright_picture():
    lying = Image.new("RGB", (40, 20), "white")  # the upper half of the upright one is blue
    lying.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    file.seek(0)
    drawn = pointed((0.5, 0.25)).draw(file, line_width=1)
    assert drawn.size == (20, 40)
    assert drawn.getpixel((10, 10)) == FIRST
    assert drawn.getpixel((1, 1)) == (0, 0, 255)
    assert drawn.getpixel((1, 38)) == WHITE


def test_picture_of_any_mode_becomes_one_of_colours_and_may_be_tiny():
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"):
        drawn = detected(BOX).draw(Image.new(mode, (200, 100)), line_width=3)
        assert drawn.mode == "RGB"
        assert drawn.getpixel((50, 50)) == FIRST
    for size in ((1, 1), (1, 300), (300, 1), (7, 5)):
        sheet = Image.new("RGB", size, "white")
        for result in (detected(BOX), pointed((0.5, 0.5)), outlined(SQUARE)):
            assert result.draw(sheet, labels="heron").size == size


def test_what_is_no_picture_is_refused(tmp_path):
    nowhere = tmp_path / "nowhere.jpg"
    for nothing, reason in ((nowhere, "does not exist"), (b"no picture", "not a picture")):
        with pytest.raises(md.ImageError, match=reason):
            detected(BOX).draw(nothing)


# -- what the server should not have sent ---------------------------------------------


def test_outline_without_a_box_has_no_place(sheet):
    with pytest.raises(md.RequestError, match="no bbox"):
        outlined(SQUARE, None).draw(sheet)
    assert outlined(SQUARE, None).whole_path() is None


def test_outline_that_is_no_path_is_refused(sheet):
    odd = ("M 0 0 L 0.5", "hello", "0 0 L 1 1", "L 1 1 Z", "Z", "M", "M 0 0 A 1 1 0 2")
    for path in (*odd, "M nan 0 L 1 1", "M 1e999 0 L 1 1 Z"):
        for call in (outlined(path).draw, lambda _, path=path: outlined(path).whole_path()):
            with pytest.raises(md.RequestError, match="no SVG path"):
                call(sheet)


@given(
    path=st.text("MmLlHhVvCcSsQqTtAaZz 0123456789.,-+eE\n#"),
    bbox=st.builds(md.Region, *[st.floats()] * 4),
)
def test_any_path_and_any_box_are_drawn_or_refused(path, bbox):
    sheet = Image.new("RGB", (20, 10), "white")
    with contextlib.suppress(md.RequestError):
        assert outlined(path, bbox).draw(sheet, labels="x").size == (20, 10)


@given(x=st.floats(), y=st.floats())
def test_any_place_is_drawn(x, y):
    sheet = Image.new("RGB", (20, 10), "white")
    for result in (
        pointed((x, y)),
        detected(md.Region(x, y, y, x)),
        thought("x", (0, 1, ((x, y),))),
    ):
        assert result.draw(sheet, labels="x").size == (20, 10)


ARC = "A 0.7 0.4 0 1 1 0.3 0.9 A 0.2 0.6 0 1 0 0.8 0.1 "
ZIGZAG = "L 0.1 0.9 L 0.9 0.2 "


MANY = {
    "boxes": (lambda: detected(*[BOX] * 2_000), None),
    "points": (lambda: pointed(*[(0.5, 0.5)] * 5_000), None),
    "arcs": (lambda: outlined("M 0 0 " + ARC * 1_000 + "Z"), None),
    "outlines": (lambda: outlined(f"{FORWARD} {BACKWARD} " * 500), None),
    "label": (lambda: detected(BOX), "W" * 1_000_000),
    "label of words": (lambda: detected(BOX), "heron " * 200_000),
    "thought": (lambda: thought("W" * 1_000_000, (0, 1_000_000, ((0.5, 0.5),))), None),
}
FAR_TOO_MANY = {
    "boxes": lambda: detected(*[BOX] * 100_000),
    "points": lambda: pointed(*[(0.5, 0.5)] * 100_000),
    "thoughts": lambda: thought("x", (0, 1, ((0.5, 0.5),) * 100_000)),
    "corners": lambda: outlined("M 0 0 " + ZIGZAG * 6_000 + "Z"),
    "characters": lambda: outlined("M 0 0 " + ZIGZAG * 60_000 + "Z"),
    "outlines": lambda: outlined(f"{FORWARD} " * 20_000),
}


@pytest.mark.parametrize("name", MANY)
def test_more_than_anybody_sees_is_drawn_all_the_same(sheet, name):
    make, labels = MANY[name]
    assert changed(sheet, make().draw(sheet, labels=labels))


@pytest.mark.slow
def test_far_more_than_anybody_sees_is_refused(sheet):
    for name, make in FAR_TOO_MANY.items():
        with pytest.raises(md.RequestError, match="too many"):
            pytest.fail(f"{name} came out as {make().draw(sheet)}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.slow
def test_memory_of_drawing_is_that_of_the_result_and_150_mb():
    size = (6000, 4000)
    results = [
        outlined(f"M 0 0 {ARC} Z {SQUARE}"),
        detected(md.Region(0, 0, 1, 1)),
    ]
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            photo = Image.new("RGB", size, "white")
            base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for result in results:
                result.draw(photo, labels="W" * 1_000_000)
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base  # kB
            status = most * 1024 > size[0] * size[1] * 4 + 150_000_000
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_outline_on_a_large_picture_is_drawn_as_on_a_small_one():
    picture = Image.new("RGB", (6000, 4000), "white")
    drawn = outlined(f"{SQUARE} {BACKWARD}").draw(picture)
    at = {x: drawn.getpixel((round(x * 6000), 1040)) for x in (0.2, 0.25, 0.3)}
    assert is_near(at[0.3], TINTED)
    assert (at[0.25], at[0.2], drawn.getpixel((3000, 2000))) == (FIRST, WHITE, WHITE)
    assert picture.getextrema() == ((255, 255),) * 3


def test_result_without_places_cannot_be_drawn(sheet):
    with pytest.raises(md.RequestError, match="a CaptionResult has no places"):
        draw(md.CaptionResult(caption="A heron."), sheet)


# -- the whole path -------------------------------------------------------------------


def places(path):
    numbers = [float(number) for number in re.findall(r"-?[\d.]+(?:E-?\d+)?", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_whole_path_is_where_the_transform_puts_the_path():
    result = outlined("M 0 0.5 L 1 1 C 0 0.25 0.5 0.75 1 0 Z")
    move, scale = re.fullmatch(r"translate\((.+)\) scale\((.+)\)", result.transform).groups()
    dx, dy = map(float, move.split())
    width, height = map(float, scale.split())
    moved = [(dx + x * width, dy + y * height) for x, y in places(result.path)]
    assert places(result.whole_path()) == [pytest.approx(place, abs=1e-5) for place in moved]
    assert re.sub(r"[-\d., E]", "", result.whole_path()) == "MLCZ"


def test_whole_path_keeps_the_form_of_the_path():
    for path, whole in {
        "": "",
        "M 0 0 L 1 1 Z": "M 0.5,0.5 L 0.75,1 Z",
        "m 0 0 l 1 0 v 1 h -0.5 z": "m 0.5,0.5 l 0.25,0 v 0.5 h -0.125 z",
        "M 0 0 Q 1 0 1 1 T 1 2": "M 0.5,0.5 Q 0.75,0.5 0.75,1 T 0.75,1.5",
        "M 0 0 1 1 1 0 z m 0.5 0.5 l 0.25 0": (
            "M 0.5,0.5 L 0.75,1 L 0.75,0.5 z m 0.125,0.25 l 0.0625,0"
        ),
    }.items():
        assert outlined(path, md.Region(0.5, 0.5, 0.75, 1)).whole_path() == whole


def test_arcs_of_a_whole_path_are_stretched_with_it():
    whole = outlined(CIRCLES["arcs"], md.Region(0, 0, 1, 0.5)).whole_path()
    for x, y in places(whole):
        assert (2 * x - 1) ** 2 + (4 * y - 1) ** 2 == pytest.approx(1, abs=1e-4)


# -- masks ----------------------------------------------------------------------------

LEFT, RIGHT = "M 0 0 H 0.25 V 1 H 0 Z", "M 0.75 0 H 1 V 1 H 0.75 Z"
CORNERS, MIDDLE = [(0, 0), (199, 0), (0, 99), (199, 99)], [(100, 50)]


MASKS = {  # the path, its box, where the mask is white and where black, and its white pixels
    "all": (SQUARE, WHOLE, [*CORNERS, *MIDDLE], [], 200 * 100),
    "box": (SQUARE, BOX, [(50, 20), (149, 79)], [(49, 50), (150, 50), (100, 19), (100, 80)], 6000),
    "triangle": ("M 0 0 L 1 0 L 0 1 Z", WHOLE, [(0, 0), (95, 48)], [(105, 52), (199, 99)], 10_000),
    **{
        name: (path, WHOLE, [*MIDDLE, (1, 50), (100, 1), (30, 15)], [*CORNERS, (27, 13)], 15_708)
        for name, path in CIRCLES.items()
    },
    "quadratic": (
        "M 0.5 0 Q 1 0 1 0.5 T 0.5 1 T 0 0.5 T 0.5 0 Z",
        WHOLE,
        [*MIDDLE, (50, 25)],
        [(10, 5), (189, 94)],
        16_667,
    ),
    "circle in a box": (
        CIRCLES["cubic"],
        BOX,
        [*MIDDLE, (51, 50), (66, 30)],
        [(50, 20), (149, 79), (62, 26)],
        4_712,
    ),
    "hole": (f"{SQUARE} {BACKWARD}", WHOLE, [*CORNERS, (49, 50)], [*MIDDLE, (52, 26)], 15_000),
    "hole first": (f"{BACKWARD} {SQUARE}", WHOLE, CORNERS, MIDDLE, 15_000),
    "no hole": (f"{SQUARE} {FORWARD}", WHOLE, [*CORNERS, *MIDDLE], [], 20_000),
    "many": (f"{SQUARE} {FORWARD} {BACKWARD} {BACKWARD}", WHOLE, CORNERS, MIDDLE, 15_000),
    "parts": (f"{LEFT} {RIGHT}", WHOLE, [*CORNERS, (49, 5), (150, 5)], [(51, 5), *MIDDLE], 10_000),
    "nothing": ("", None, [], [*CORNERS, *MIDDLE], 0),
}


def test_mask_is_true_inside_the_outline():
    for name, (path, bbox, white, black, pixels) in MASKS.items():
        mask = outlined(path, bbox).to_mask(200, 100)
        array = np.asarray(mask)

        assert (mask.mode, mask.size) == ("1", (200, 100))
        assert (array.dtype, array.shape) == (bool, (100, 200))
        assert [place for place in white if not array[place[1], place[0]]] == [], name
        assert [place for place in black if array[place[1], place[0]]] == [], name
        assert array.sum() == pytest.approx(pixels, abs=pixels / 100), name


def test_mask_of_no_size_is_refused():
    for size in ((0, 5), (5, -1), (1.5, 2), ("5", 5), (True, 5), (10**6, 10**6)):
        for path in ("", SQUARE):
            with pytest.raises(md.RequestError, match=r"width|height|pixels"):
                outlined(path).to_mask(*size)


def test_mask_of_a_large_picture_is_made_within_its_own_memory():
    array = np.asarray(outlined(SQUARE).to_mask(8000, 4000))

    assert array[800:3200, 2000:6000].all()
    assert array.sum() == pytest.approx(4000 * 2400, rel=0.001)


# -- what it needs --------------------------------------------------------------------


def test_missing_extra_is_named_where_it_is_needed(sheet, monkeypatch):
    for name in ("svg", "svg.path"):
        monkeypatch.setitem(sys.modules, name, None)
    square = outlined(SQUARE)
    for call in (square.draw, lambda _: square.whole_path(), lambda _: square.to_mask(9, 9)):
        with pytest.raises(ImportError, match=re.escape("pip install 'moondream-async[draw]'")):
            call(sheet)
    assert detected(BOX).draw(sheet) != sheet
