"""The sample picture: drawn by this file, so that anybody may use it for anything.

``python -m moondream_async.simulator.sample`` draws it anew.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

SAMPLE_IMAGE = Path(__file__).with_name("sample.jpg")
"""A JPEG of 640x480 pixels: a red circle, a blue square, a green triangle, and little else."""


def draw_sample() -> Image.Image:
    """Draw the scene: three shapes of clear colours and a sun, before a light wall."""
    image = Image.new("RGB", (640, 480), (242, 240, 232))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 400, 640, 480), fill=(200, 200, 200))
    draw.ellipse((60, 180, 220, 340), fill=(220, 30, 30))
    draw.rectangle((260, 240, 400, 380), fill=(30, 60, 210))
    draw.polygon([(520, 160), (600, 340), (440, 340)], fill=(20, 150, 50))
    draw.ellipse((530, 30, 600, 100), fill=(255, 215, 0))
    return image


if __name__ == "__main__":
    draw_sample().save(SAMPLE_IMAGE, quality=90, optimize=True)
