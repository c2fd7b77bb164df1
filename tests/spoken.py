"""Speaking to a server with plain aiohttp, which shares nothing with the client."""

import base64
import contextlib
import json
from typing import NamedTuple

import aiohttp

from moondream_async.simulator import SAMPLE_IMAGE

SAMPLE = f"data:image/jpeg;base64,{base64.b64encode(SAMPLE_IMAGE.read_bytes()).decode()}"


class Answer(NamedTuple):
    """What came, and whether it ended in good order."""

    status: int
    headers: dict[str, str]
    data: bytes
    whole: bool

    @property
    def json(self):
        return json.loads(self.data)

    @property
    def message(self):
        """Of an error, in the words of the cloud or of the engine."""
        error = self.json["error"]
        return error if isinstance(error, str) else error["message"]

    @property
    def events(self):
        """The events of a stream that is whole: JSON in data lines with blank lines between."""
        *events, rest = self.data.decode().removesuffix("data: [DONE]\n\n").split("\n\n")
        assert rest == ""
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    @property
    def chunks(self):
        return [event["chunk"] for event in self.events if event.get("chunk")]

    @property
    def text(self):
        return "".join(self.chunks)


async def speak(server, method, path, *, ssl=True, **options):
    """Send a request to a path below the endpoint, or to an address."""
    url = path if "://" in path else server.endpoint + path
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, url, ssl=ssl, allow_redirects=False, **options) as response,
    ):
        data, whole = b"", False
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            async for part in response.content.iter_any():
                data += part
            whole = True
        return Answer(response.status, dict(response.headers), data, whole)


async def get(server, path, **options):
    return await speak(server, "GET", path, **options)


async def post(server, path, body=None, **options):
    return await speak(server, "POST", path, json=body, **options)


async def stream(server, path, body):
    return await post(server, path, body | {"stream": True})
