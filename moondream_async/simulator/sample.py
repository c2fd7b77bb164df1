"""Draws the sample picture, which is free for any use.

``python -m moondream_async.simulator.sample`` draws it anew.
"""

from __future__ import annotations

from PIL import Image, ImageDraw

from moondream_async.types import SAMPLE_IMAGE

_FINE = 4  # times as large is the drawing: reducing it makes its edges smooth
_SIZE = (640, 480)

# box: left top right bottom; disc: x y across down; shape: corners; line: ends width.
_SCENE = """
disc 565 65 35 35 #ffd700
disc 57 62.5 15 15 #ffffff
disc 81 58 24 24 #ffffff
disc 111 60 20 20 #ffffff
disc 135 63.5 13 13 #ffffff
box 55 55 137 70 #ffffff
disc 292 102.5 15 15 #ffffff
disc 316 98 24 24 #ffffff
disc 346 100 20 20 #ffffff
disc 370 103.5 13 13 #ffffff
box 290 95 372 110 #ffffff
box 512 338 528 402 #7a4a20
shape 520 160 600 340 440 340 #14963a
shape 492 222 548 222 520 244 #0a7a2c
shape 466 281 574 281 520 303 #0a7a2c
shape 520 160 600 340 560 340 #0f862f
box 360 196 378 236 #8b4513
shape 244 242 330 178 416 242 #8b4513
box 260 241 400 380 #1e3cd2
box 254 380 406 402 #b8b8b8
box 278 262 308 296 #f6f3e4
line 293 262 293 296 2 #1e3cd2
line 278 279 308 279 2 #1e3cd2
box 352 262 382 296 #f6f3e4
line 367 262 367 296 2 #1e3cd2
line 352 279 382 279 2 #1e3cd2
box 316 318 344 380 #8b4513
disc 339 350 2 2 #ffd700
box 0 400 640 480 #c4c4c4
line 0 401 640 401 2 #9a9a9a
box 20 438 70 443 #f4f4f0
box 120 438 170 443 #f4f4f0
box 220 438 270 443 #f4f4f0
box 320 438 370 443 #f4f4f0
box 420 438 470 443 #f4f4f0
box 520 438 570 443 #f4f4f0
box 620 438 670 443 #f4f4f0
line 96 320 126 366 1.5 #5a4632
line 184 320 154 366 1.5 #5a4632
disc 140 260 80 80 #dc1e1e
disc 140 260 54 80 #c81414
disc 140 260 28 80 #e63228
box 124 364 156 388 #8b4513
box 121 362 159 367 #643c1e
"""


def draw_sample() -> Image.Image:
    """Draw the scene: a red balloon, a blue house and a green tree by a road, on a fine day."""
    image = _sky().resize([_FINE * side for side in _SIZE])
    draw = ImageDraw.Draw(image)
    for line in _SCENE.strip().splitlines():
        kind, *numbers, colour = line.split()
        places = [_FINE * float(number) for number in numbers]
        if kind == "box":
            draw.rectangle(places, colour)
        elif kind == "disc":
            x, y, across, down = places
            draw.ellipse((x - across, y - down, x + across, y + down), colour)
        elif kind == "shape":
            draw.polygon(places, colour)
        else:
            draw.line(places[:-1], colour, round(places[-1]), joint="curve")
    return image.resize(_SIZE, Image.Resampling.LANCZOS)


def _sky() -> Image.Image:
    """Return a column of pixels from light blue to the haze over the horizon."""
    image = Image.new("RGB", (1, 100))
    for row in range(100):
        share = row / 99
        image.putpixel((0, row), (round(222 + 24 * share), round(236 + 7 * share), 248 - row // 8))
    return image


if __name__ == "__main__":
    draw_sample().save(SAMPLE_IMAGE, quality=88, optimize=True)
