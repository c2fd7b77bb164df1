"""aiohttp as most people write it: a line at a time, and `json.loads`."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import json

from . import _same, floor_aiohttp

NAME = "aiohttp, async for line"
NEEDS = ("aiohttp",)


def open(endpoint, connections):  # noqa: A001 - as the others
    return floor_aiohttp.open(endpoint, connections, Session)


class Session(floor_aiohttp.Session):
    async def caption(self, pieces):
        post = self._session.post(
            f"{self._endpoint}/caption", data=_same.CAPTION, headers=_same.EVENT_STREAM
        )
        async with post as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    pieces.append(json.loads(line[6:])["chunk"])

    async def chat(self, pieces):
        post = self._session.post(
            f"{self._endpoint}/chat/completions", data=_same.CHAT, headers=_same.EVENT_STREAM
        )
        async with post as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    pieces.append(delta.get("content", ""))

    async def call(self):
        post = self._session.post(f"{self._endpoint}/caption", data=_same.CALL, headers=_same.JSON)
        async with post as response:
            return (await response.json())["caption"]
