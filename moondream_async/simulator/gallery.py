"""Decodes and measures the pictures of requests, in threads, so that the loop never waits."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import anyio
import anyio.to_thread

from .pixels import Picture, UnreadablePictureError, measure
from .validation import RefusedError, decode_image

T = TypeVar("T")

# How many pictures' measurements are kept; each is some tens of kilobytes.
_KEPT_PICTURES = 64

_AT_ONCE = 4  # pictures measured together: two gigabytes at worst


class Gallery:
    """Measures pictures, and remembers the latest ones."""

    _measured: ClassVar[OrderedDict[bytes, Picture]] = OrderedDict()  # of all simulators

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(_AT_ONCE)

    async def run(self, look: Callable[..., T], *args: Any) -> T:
        """Call a function that looks at pictures, in a worker thread.

        Cancelling waits for the thread, which takes tenths of a second for a picture.
        """
        return await anyio.to_thread.run_sync(look, *args, limiter=self._limiter)

    def look(self, image_url: str) -> Picture:
        """Decode a data URL and measure the picture in it. Blocks.

        Raises:
            RefusedError: The data URL is malformed, or doesn't hold a picture.
        """
        data = decode_image(image_url)
        digest = hashlib.sha256(data).digest()
        picture = self._measured.get(digest)
        if picture is None:
            try:
                picture = self._measured[digest] = measure(data)
            except UnreadablePictureError as error:
                raise RefusedError("Invalid image data", param="image_url") from error
            while len(self._measured) > _KEPT_PICTURES:
                self._measured.popitem(last=False)
        return picture
