"""The floor below all: an asyncio transport whose bytes are counted, and not looked at."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import asyncio
import contextlib
from urllib.parse import urlsplit

from . import _same

NAME = "floor: raw bytes"
NEEDS = ()
COUNTS_BYTES = True


@contextlib.asynccontextmanager
async def open(endpoint, connections):  # noqa: A001, ARG001 - as the others
    yield Session(endpoint)


class Session:
    def __init__(self, endpoint):
        address = urlsplit(endpoint)
        self._where = address.hostname, address.port
        self._path = address.path
        self._idle = []

    async def caption(self, pieces):
        await self._stream("caption", _same.CAPTION, pieces)

    async def chat(self, pieces):
        await self._stream("chat/completions", _same.CHAT, pieces)

    async def _stream(self, path, body, pieces):
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(*self._where)
        )
        writer.write(
            b"POST %b/%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
            % (self._path.encode(), path.encode(), len(body), body)
        )
        received, last = 0, b""
        while not last.endswith(b"\r\n0\r\n\r\n"):
            data = await reader.read(65_536)
            if not received:
                pieces.append(0)
            received += len(data)
            pieces[0] = received
            last = data if len(data) > 6 else last[-6:] + data
        self._idle.append((reader, writer))
