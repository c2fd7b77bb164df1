"""The openai package with the HTTP client that it brings, on the chat stream."""
# ruff: noqa: D101, D102 - the package's docstring says what each has

import contextlib

import openai

from benchmarks.wire import MODEL

from . import _same

NAME = "openai"
NEEDS = ("openai", "httpx2")
ONLY_CHAT = True


@contextlib.asynccontextmanager
async def open(endpoint, connections, kind=openai.DefaultAsyncHttpxClient):  # noqa: A001
    assert connections <= openai.DEFAULT_CONNECTION_LIMITS.max_connections
    async with openai.AsyncOpenAI(api_key="none", base_url=endpoint, http_client=kind()) as client:
        yield Session(client)


class Session:
    def __init__(self, client):
        self._client = client

    async def chat(self, pieces):
        stream = await self._client.chat.completions.create(
            model=MODEL, messages=_same.MESSAGES, stream=True
        )
        async for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")

    async def bulk(self, paths, at_once):
        """Ask the chat about each picture, in as many workers as are to be at once."""

        async def ask(path):
            messages = _same.messages_about(path)
            answer = await self._client.chat.completions.create(model=MODEL, messages=messages)
            return answer.choices[0].message.content

        return await _same.in_workers(ask, paths, at_once)
