"""Hugging Face's client for inference servers, on the chat."""
# ruff: noqa: D101 - the package's docstring says what each has

import asyncio
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
        left, answers = iter(paths), []

        async def work():
            for path in left:
                answer = await self._client.chat_completion(_same.messages_about(path), model=MODEL)
                answers.append(answer.choices[0].message.content)

        await asyncio.gather(*(work() for _ in range(at_once)))
        return answers
