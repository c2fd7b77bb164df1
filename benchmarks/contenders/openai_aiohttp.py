"""The openai package with its aiohttp transport, on the chat stream."""

import openai

from . import openai_default

NAME = "openai, aiohttp"
NEEDS = ("openai", "aiohttp")
ONLY_CHAT = True


def open(endpoint, connections):  # noqa: A001 - as the others
    return openai_default.open(endpoint, connections, openai.DefaultAioHttpClient)
