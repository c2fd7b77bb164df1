"""Files that are uploaded piece by piece, with a few pieces in memory, whatever their size.

Worker threads read the file, since reading blocks. Several parts of a file may be uploaded at
once. They share one open file, so that all parts come from the same file, even if another file
takes its name meanwhile, or if it has no name.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import BinaryIO

import anyio.to_thread

from moondream_async.errors import MoondreamError, RequestError

_PIECE_BYTES = 256 * 1024  # read at once: enough to pay for the change of threads


class SharedFile:
    """An open file that several tasks read at once, each at its own position."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._lock = threading.Lock()  # guards the position of the file

    def slices(self, size: int) -> list[FileSlice]:
        """Return slices of `size` bytes; the last one may be shorter."""
        return [
            FileSlice(self, start, min(size, self.size - start))
            for start in range(0, self.size, size)
        ]

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on. Blocks.

        Raises:
            RequestError: The file has become shorter.
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
    """A part of a file to upload; each iteration gives its bytes from the beginning."""

    def __init__(self, file: SharedFile, start: int, size: int) -> None:
        self.size = size
        self._file = file
        self._start = start

    async def __aiter__(self) -> AsyncIterator[bytes]:
        end = self._start + self.size
        for start in range(self._start, end, _PIECE_BYTES):
            size = min(_PIECE_BYTES, end - start)
            yield await anyio.to_thread.run_sync(self._file.read, start, size)
