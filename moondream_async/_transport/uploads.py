"""Bodies of requests, written piece by piece."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import msgspec

from moondream_async.types import EncodedImage

from .files import FileSlice
from .private import is_quiet

try:
    import fcntl
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

Part = bytes | EncodedImage | FileSlice
"""A part of a body; an image is sent as a data URL in quotes."""

_SLICE_BYTES = 48 * 1024  # of a picture, encoded at once: 64 KiB of base64
_LOOK = 0.02  # seconds until the second look whether the last bytes were sent
_LONGEST_PAUSE = 1.0  # seconds between two of these looks
_SMALL_BODY_BYTES = 64 * 1024  # a body up to this size is sent in one piece


class Upload(aiohttp.payload.Payload):
    """A body that is written piece by piece; pictures become base64 on the way.

    So a picture of 5 MB takes 5 MB of memory while it is sent, without a copy in base64 or JSON,
    and a file of any size takes a few pieces. No step blocks the event loop for long.
    """

    _autoclose = True

    def __init__(
        self,
        parts: Sequence[Part],
        used: weakref.WeakSet[asyncio.BaseProtocol],
        on_send: Callable[[Upload], None],
        *,
        on_new: bool = False,
        size: int | None = None,
    ) -> None:
        is_file = bool(parts) and isinstance(parts[0], FileSlice)  # a file is a whole body
        kind = "application/octet-stream" if is_file else "application/json"
        super().__init__(parts, content_type=kind)
        self._parts = parts
        self._size = size = size_on_wire(parts) if size is None else size
        self._is_small = not is_file and size <= _SMALL_BODY_BYTES
        self._used = used
        self._on_send = on_send
        self._on_new = on_new
        self._writer: Any = None
        self._written = 0
        self._seen = 0
        self.reused = False
        """Whether its connection was used by an earlier request."""
        self.refused = False
        """Whether nothing was sent, since the idle connection must not be used again."""
        self.is_sent = False
        """Whether its last byte was sent."""
        self._is_over = False

    def end(self) -> None:
        """Stop looking whether the last bytes were sent: the request was answered, or failed."""
        self._is_over = True

    def moved(self) -> bool:
        """Tell whether any bytes were sent since the last time this was called."""
        gone = self._written - _unsent(self._writer)
        moved, self._seen = gone > self._seen, gone
        return moved

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return _whole(self._parts).decode(encoding, errors)

    async def write(self, writer: Any) -> None:
        # Connections are remembered by their protocol, since transports of uvloop with TLS have
        # no weak references. The first write notices if the connection is lost.
        self.reused = writer.protocol in self._used
        if self.reused and (self._on_new or not is_quiet(writer.protocol)):
            self.refused = True
            raise ConnectionResetError("a connection that was kept is not used again")
        if not self.reused:
            self._used.add(writer.protocol)
        self._writer = writer
        self.is_sent = self._is_small
        self._on_send(self)
        if self._is_small:
            await writer.write(_whole(self._parts))
            return
        async for piece in self._slowly():
            await writer.write(piece)
            self._written += len(piece)
        # Not awaited: aiohttp closes a connection whose answer ends before `write` returns.
        self._look_until_sent(_LOOK)

    def _look_until_sent(self, pause: float) -> None:
        if self._is_over:
            return
        if _unsent(self._writer):
            longer = min(2 * pause, _LONGEST_PAUSE)
            asyncio.get_running_loop().call_later(pause, self._look_until_sent, longer)
            return
        self.is_sent = True
        self._on_send(self)

    async def _slowly(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, FileSlice):
                async for piece in part:
                    yield piece
                return
        for index, piece in enumerate(self._pieces()):
            if index:
                await asyncio.sleep(0)  # write() yields to other tasks only when the socket is full
            yield piece

    def _pieces(self) -> Any:
        for part in self._parts:
            if isinstance(part, EncodedImage):
                yield f'"data:{part.media_type};base64,'.encode()
                view = memoryview(part.data)
                for start in range(0, len(view), _SLICE_BYTES):
                    yield binascii.b2a_base64(view[start : start + _SLICE_BYTES], newline=False)
                yield b'"'
            else:
                yield part


def _unsent(writer: Any) -> int:
    """Return how many bytes wait in this process or in the system's queue; 0 if unknown."""
    transport = writer.transport
    if transport is None or transport.is_closing():
        return 0
    waiting: int = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    if termios is not None and sock is not None:
        with contextlib.suppress(OSError, ValueError):
            answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0")
            waiting += int.from_bytes(answer, sys.byteorder)
    return waiting


_FRAME_BYTES = len('"data:;base64,"')


def size_on_wire(parts: Sequence[Part]) -> int:
    """Return the size of a body in bytes, as it is sent."""
    size = 0
    for part in parts:
        if type(part) is bytes:
            size += len(part)
        elif isinstance(part, EncodedImage):
            size += _FRAME_BYTES + len(part.media_type) + (len(part.data) + 2) // 3 * 4
        else:
            size += part.size  # type: ignore[union-attr]
    return size


_encode_bytes = msgspec.json.Encoder().encode


def _whole(parts: Sequence[Any]) -> bytes:
    """Return a body, other than a file, in one piece."""
    pieces: list[bytes | memoryview] = []
    for part in parts:
        if type(part) is bytes:
            pieces += (part,)
        else:
            # In quotes, as base64, in two thirds of binascii's time.
            quoted = memoryview(_encode_bytes(part.data))
            pieces += (f'"data:{part.media_type};base64,'.encode(), quoted[1:])
    return b"".join(pieces)
