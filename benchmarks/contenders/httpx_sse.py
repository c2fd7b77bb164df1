"""httpx with httpx-sse, as its readme shows it."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import contextlib
import json

import httpx
from httpx_sse import aconnect_sse

from . import _same

NAME = "httpx + httpx-sse"
NEEDS = ("httpx", "httpx-sse")


@contextlib.asynccontextmanager
async def open(endpoint, connections, library=httpx):  # noqa: A001 - as the others
    # To keep more idle connections than it does by default is no help: the pool looks at
    # each of them, for each of them, whenever one is freed.
    limits = library.Limits(max_connections=connections)
    async with library.AsyncClient(limits=limits, timeout=None) as client:
        yield Session(endpoint, client)


class Session:
    def __init__(self, endpoint, client):
        self._endpoint = endpoint
        self._client = client

    async def caption(self, pieces):
        address, headers = f"{self._endpoint}/caption", dict(_same.JSON)
        async with aconnect_sse(
            self._client, "POST", address, content=_same.CAPTION, headers=headers
        ) as source:
            async for event in source.aiter_sse():
                pieces.append(json.loads(event.data)["chunk"])

    async def chat(self, pieces):
        address, headers = f"{self._endpoint}/chat/completions", dict(_same.JSON)
        async with aconnect_sse(
            self._client, "POST", address, content=_same.CHAT, headers=headers
        ) as source:
            async for event in source.aiter_sse():
                if event.data != "[DONE]":
                    delta = json.loads(event.data)["choices"][0]["delta"]
                    pieces.append(delta.get("content", ""))

    async def call(self):
        address = f"{self._endpoint}/caption"
        response = await self._client.post(address, content=_same.CALL, headers=_same.JSON)
        return response.json()["caption"]
