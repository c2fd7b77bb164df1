"""Files that go up piece by piece: a few pieces in memory, whatever their size.

Reading blocks, so a worker thread does it. Several parts of one file may be on
their way at once; they share one open file, so that what goes up is that file,
even if another one takes its name meanwhile, or if it has none.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import BinaryIO

import anyio.to_thread

from moondream_async.errors import MoondreamError, RequestError

_PIECE_BYTES = 256 * 1024  # read at once: long enough to be worth a change of threads


class SharedFile:
    """An open file that several tasks read at once, each where it wants to."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._lock = threading.Lock()  # of the one position that the file has

    def slices(self, size: int) -> list[FileSlice]:
        """Cut it into slices of `size` bytes, the last of which may be shorter."""
        return [
            FileSlice(self, start, min(size, self.size - start))
            for start in range(0, self.size, size)
        ]

    def read(self, start: int, size: int) -> bytes:
        """Return the bytes from `start` on. Blocks.

        Raises:
            RequestError: They are no longer there.
            MoondreamError: The file can't be read.
        """
        try:
            with self._lock:
                self._file.seek(start)
                data = self._file.read(size)
        except OSError as error:
            raise MoondreamError(f"The file can't be read: {error}") from error
        if len(data) < size:
            raise RequestError("The file became shorter while it was being uploaded")
        return data


class FileSlice:
    """A stretch of a file, to be sent; iterating it, again and again, gives its bytes."""

    def __init__(self, file: SharedFile, start: int, size: int) -> None:
        self.size = size
        self._file = file
        self._start = start

    async def __aiter__(self) -> AsyncIterator[bytes]:
        end = self._start + self.size
        for start in range(self._start, end, _PIECE_BYTES):
            size = min(_PIECE_BYTES, end - start)
            yield await anyio.to_thread.run_sync(self._file.read, start, size)
