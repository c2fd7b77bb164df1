"""Hugging Face's client for inference servers, on the chat."""
# ruff: noqa: D101 - the package's docstring says what each has

import contextlib

import huggingface_hub

from benchmarks.wire import MODEL

from . import _same

NAME = "huggingface_hub"
NEEDS = ("huggingface_hub",)


@contextlib.asynccontextmanager
async def open(endpoint, connections):  # noqa: A001, ARG001 - as the others
    async with huggingface_hub.AsyncInferenceClient(base_url=endpoint, api_key="none") as client:
        yield Session(client)


class Session:
    def __init__(self, client):
        self._client = client

    async def bulk(self, paths, at_once):
        """Ask the chat about each picture, in as many workers as are to be at once."""

        async def ask(path):
            answer = await self._client.chat_completion(_same.messages_about(path), model=MODEL)
            return answer.choices[0].message.content

        return await _same.in_workers(ask, paths, at_once)
