"""A picture in the terminal, and a text that grows under it, wrapped at words."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moondream_async import EncodedImage

_BESIDES = 9  # lines of text around the picture
_WIDEST = 72  # columns; lines longer than that are hard to read


def width() -> int:
    """Return how many columns the text takes."""
    # At least 20: some terminals report 0 columns.
    return max(20, min(shutil.get_terminal_size().columns - 1, _WIDEST))


def show_picture(picture: EncodedImage) -> None:
    """Draw a picture, two pixels to a character, where the terminal has colours."""
    from PIL import Image  # noqa: PLC0415 - takes a while to load, as rich does
    from rich.console import Console  # noqa: PLC0415
    from rich.segment import Segment, Segments  # noqa: PLC0415
    from rich.style import Style  # noqa: PLC0415

    console = Console()
    if (
        console.no_color
        or console.color_system is None
        or not (console.encoding or "").startswith("utf")
    ):
        return
    rows = max(4, console.height - _BESIDES)
    with Image.open(io.BytesIO(picture.data)) as opened:
        opened.draft("RGB", (4 * width(), 8 * rows))
        image = opened.convert("RGB")
    image.thumbnail((width(), 2 * rows))
    if image.height % 2:
        image = image.resize((image.width, image.height + 1))
    data = image.tobytes()
    colours = [f"#{data[at : at + 3].hex()}" for at in range(0, len(data), 3)]
    segments = []
    for row in range(0, image.height, 2):
        upper = colours[row * image.width :][: image.width]
        lower = colours[(row + 1) * image.width :][: image.width]
        for above, below in zip(upper, lower, strict=True):
            segments.append(Segment("▀", Style(color=above, bgcolor=below)))
        segments.append(Segment.line())
    console.print(Segments([*segments, Segment.line()]), end="")


class Wrapper:
    r"""Breaks a text that comes in pieces into lines, between words.

    >>> wrapper = Wrapper(9)
    >>> "".join(map(wrapper.feed, ["A re", "d ball", "oon", " and"])) + wrapper.end()
    'A red\nballoon\nand'
    """

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._at = 0
        self._word = ""  # not complete yet; with the space before it

    def feed(self, piece: str) -> str:
        """Take a piece; return the text up to the last complete word."""
        written = ""
        for character in piece:
            if character.isspace() and self._word.strip():
                written += self._place()
            if character == "\n":
                written += "\n"
                self._at, self._word = 0, ""
            else:
                self._word += " " if character.isspace() else character
        return written

    def end(self) -> str:
        """Return the last word."""
        return self._place() if self._word.strip() else ""

    def _place(self) -> str:
        from rich.cells import cell_len  # noqa: PLC0415 - as above

        word, self._word = self._word, ""
        if self._at and self._at + cell_len(word) > self._columns:
            word = word.lstrip()
            self._at = cell_len(word)
            return f"\n{word}"
        word = word if self._at else word.lstrip()
        self._at += cell_len(word)
        return word
