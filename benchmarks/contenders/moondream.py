"""This project."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import contextlib

import moondream_async as md

from . import _same

NAME = "moondream_async"
NEEDS = ("moondream-async", "aiohttp", "anyio", "msgspec")
TINY = md.EncodedImage(_same.TINY, _same.TYPE, 8, 8)
# All limits are watched; but ten thousand connections at once take longer than ten seconds.
TIMEOUT = md.Timeout(connect=120, pool=120)
PICTURE = md.EncodedImage(_same.PICTURE, _same.TYPE, 80, 80)


@contextlib.asynccontextmanager
async def open(endpoint, connections):  # noqa: A001 - as the others
    async with md.MoondreamClient(
        endpoint=endpoint, timeout=TIMEOUT, max_connections=connections
    ) as client:
        yield Session(client)


class Session:
    def __init__(self, client):
        self._client = client

    async def caption(self, pieces):
        stream = await self._client.caption(TINY, stream=True)
        async for piece in stream:
            pieces.append(piece)

    async def chat(self, pieces):
        stream = await self._client.chat(_same.MESSAGES, stream=True)
        async for piece in stream:
            pieces.append(piece)

    async def call(self):
        return (await self._client.caption(PICTURE)).caption

    async def bulk(self, paths, at_once):
        async with self._client.bulk(paths, "caption", concurrency=at_once) as run:
            return [done.result.caption async for done in run]

    async def bulk_by_calls(self, paths, at_once):
        async def ask(path):
            return (await self._client.caption(path)).caption

        return await _same.in_workers(ask, paths, at_once)
