"""Draws the sample picture, which is free for any use.

``python -m moondream_async.simulator.sample`` draws it anew.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from moondream_async.types import SAMPLE_IMAGE

_FINE = 4  # times as large is the drawing: reducing it makes its edges smooth
_SIZE = (640, 480)


class _Pen:
    """Draws in pixels of the picture as it will be."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def box(self, left: float, top: float, right: float, bottom: float, fill: str) -> None:
        self._draw.rectangle([_FINE * each for each in (left, top, right, bottom)], fill)

    def disc(self, x: float, y: float, across: float, down: float, fill: str) -> None:
        sides = (x - across, y - down, x + across, y + down)
        self._draw.ellipse([_FINE * each for each in sides], fill)

    def shape(self, corners: str, fill: str) -> None:
        self._draw.polygon([_FINE * float(each) for each in corners.split()], fill)

    def line(self, ends: str, width: float, fill: str) -> None:
        points = [_FINE * float(each) for each in ends.split()]
        self._draw.line(points, fill, round(_FINE * width), joint="curve")


def draw_sample() -> Image.Image:
    """Draw the scene: a red balloon, a blue house and a green tree by a road, on a fine day."""
    image = _sky().resize([_FINE * side for side in _SIZE])
    pen = _Pen(image)
    pen.disc(565, 65, 35, 35, "#ffd700")
    for x, y in ((95, 70), (330, 110)):  # clouds
        for away, size in ((-38, 15), (-14, 24), (16, 20), (40, 13)):
            pen.disc(x + away, y - size / 2, size, size, "#ffffff")
        pen.box(x - 40, y - 15, x + 42, y, "#ffffff")
    _draw_tree(pen)
    _draw_house(pen)
    pen.box(0, 400, 640, 480, "#c4c4c4")
    pen.line("0 401 640 401", 2, "#9a9a9a")
    for x in range(20, 640, 100):
        pen.box(x, 438, x + 50, 443, "#f4f4f0")
    _draw_balloon(pen)
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


def _sky() -> Image.Image:
    """From a light blue above to the haze over the horizon."""
    image = Image.new("RGB", (1, 100))
    for row in range(100):
        share = row / 99
        image.putpixel((0, row), (round(222 + 24 * share), round(236 + 7 * share), 248 - row // 8))
    return image


def _draw_tree(pen: _Pen) -> None:
    pen.box(512, 338, 528, 402, "#7a4a20")
    pen.shape("520 160 600 340 440 340", "#14963a")
    for left, right, y in ((492, 548, 222), (466, 574, 281)):  # the shadow under its branches
        pen.shape(f"{left} {y} {right} {y} 520 {y + 22}", "#0a7a2c")
    pen.shape("520 160 600 340 560 340", "#0f862f")


def _draw_house(pen: _Pen) -> None:
    pen.box(360, 196, 378, 236, "#8b4513")  # the chimney
    pen.shape("244 242 330 178 416 242", "#8b4513")
    pen.box(260, 241, 400, 380, "#1e3cd2")
    pen.box(254, 380, 406, 402, "#b8b8b8")
    for x in (278, 352):
        pen.box(x, 262, x + 30, 296, "#f6f3e4")
        pen.line(f"{x + 15} 262 {x + 15} 296", 2, "#1e3cd2")
        pen.line(f"{x} 279 {x + 30} 279", 2, "#1e3cd2")
    pen.box(316, 318, 344, 380, "#8b4513")
    pen.disc(339, 350, 2, 2, "#ffd700")


def _draw_balloon(pen: _Pen) -> None:
    pen.line("96 320 126 366", 1.5, "#5a4632")
    pen.line("184 320 154 366", 1.5, "#5a4632")
    pen.disc(140, 260, 80, 80, "#dc1e1e")
    for across, fill in ((54, "#c81414"), (28, "#e63228")):  # its panels
        pen.disc(140, 260, across, 80, fill)
    pen.box(124, 364, 156, 388, "#8b4513")
    pen.box(121, 362, 159, 367, "#643c1e")


if __name__ == "__main__":
    draw_sample().save(SAMPLE_IMAGE, quality=88, optimize=True)
