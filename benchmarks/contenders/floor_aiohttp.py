"""The floor that a client on aiohttp can't get below: `readany`, `split` and msgspec.

It knows the one form in which the events come, and looks for no fault.
"""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import base64
import contextlib
import json
from pathlib import Path

import aiohttp
import msgspec

from . import _same

NAME = "floor: aiohttp + msgspec"
NEEDS = ("aiohttp", "msgspec")


def read(path):
    return Path(path).read_bytes()


class Chunk(msgspec.Struct):
    chunk: str


class Delta(msgspec.Struct):
    content: str = ""


class Choice(msgspec.Struct):
    delta: Delta


class ChatChunk(msgspec.Struct):
    choices: list[Choice]


decode = msgspec.json.Decoder(Chunk).decode
decode_chat = msgspec.json.Decoder(ChatChunk).decode
decode_answer = msgspec.json.Decoder(dict).decode


@contextlib.asynccontextmanager
async def open(endpoint, connections, kind=None):  # noqa: A001 - as the others
    connector = aiohttp.TCPConnector(limit=connections)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield (kind or Session)(endpoint, session)


class Session:
    def __init__(self, endpoint, session):
        self._endpoint = endpoint
        self._session = session

    async def caption(self, pieces):
        post = self._session.post(
            f"{self._endpoint}/caption", data=_same.CAPTION, headers=_same.EVENT_STREAM
        )
        async with post as response:
            tail = b""
            while data := await response.content.readany():
                *events, tail = (tail + data).split(b"\n\n")
                pieces += [decode(event[6:]).chunk for event in events]

    async def chat(self, pieces):
        post = self._session.post(
            f"{self._endpoint}/chat/completions", data=_same.CHAT, headers=_same.EVENT_STREAM
        )
        async with post as response:
            tail = b""
            while data := await response.content.readany():
                *events, tail = (tail + data).split(b"\n\n")
                if events and events[-1] == b"data: [DONE]":
                    events.pop()
                pieces += [decode_chat(event[6:]).choices[0].delta.content for event in events]

    async def call(self):
        post = self._session.post(f"{self._endpoint}/caption", data=_same.CALL, headers=_same.JSON)
        async with post as response:
            return decode_answer(await response.read())["caption"]

    async def bulk(self, paths, at_once):
        """Read, encode and post each picture, in as many workers as are to be at once."""

        async def ask(path):
            image = base64.b64encode(read(path)).decode()
            url = f"data:image/jpeg;base64,{image}"
            body = json.dumps({"image_url": url, "length": "normal", "stream": False})
            post = self._session.post(
                f"{self._endpoint}/caption", data=body.encode(), headers=_same.JSON
            )
            async with post as response:
                return decode_answer(await response.read())["caption"]

        return await _same.in_workers(ask, paths, at_once)
