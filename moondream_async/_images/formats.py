"""Which files can be prepared, by name and by first bytes. Loads no other module of ours."""

from __future__ import annotations

import importlib.util
import os
from typing import Final

HEIF_INSTALL: Final = "pip install 'moondream-async[heif]'"

_HEIF_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
)

SUFFIXES: Final = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp"),
        *(".dib", ".icns", ".ico", ".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx", ".pbm"),
        *(".pcx", ".pfm", ".pgm", ".pnm", ".ppm", ".tga", ".tif", ".tiff"),
    )
)
"""The suffixes of files that `encode_image` takes, in lower case."""

HEIF_SUFFIXES: Final = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
"""Suffixes of files that `encode_image` takes with the extra ``heif``."""

OTHER_SUFFIXES: Final = frozenset(
    (
        *(".ai", ".arw", ".cr2", ".cr3", ".dds", ".dng", ".emf", ".eps", ".exr", ".fits"),
        *(".hdr", ".jxl", ".nef", ".orf", ".pdf", ".psd", ".qoi", ".raf", ".raw", ".rw2"),
        *(".sgi", ".svg", ".svgz", ".wmf", ".xcf"),
    )
)
"""Suffixes of pictures that `encode_image` does not take."""


def has_heif() -> bool:
    """Tell whether the decoder of HEIC is installed, without loading it."""
    return importlib.util.find_spec("pillow_heif") is not None


def can_prepare(name: str | os.PathLike[str]) -> bool | None:
    """Tell by a file's name whether it can be prepared; None if the name is no picture's.

    The file's contents are not read.

    >>> can_prepare("holiday.JPG"), can_prepare("drawing.psd"), can_prepare("notes.txt")
    (True, False, None)
    """
    suffix = os.path.splitext(os.fspath(name))[1].lower()  # noqa: PTH122 - cheap for each of a million
    if suffix in SUFFIXES:
        return True
    if suffix in HEIF_SUFFIXES:
        return has_heif()
    return False if suffix in OTHER_SUFFIXES else None


def is_heif(data: bytes) -> bool:
    """Tell whether a file begins as HEIC does, with a `ftyp` box and one of HEIC's brands."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return any(brands[at : at + 4] in _HEIF_BRANDS for at in (0, *range(8, len(brands), 4)))
