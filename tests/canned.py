"""A picture and a client for servers of bare sockets, and one that sends what a test hands it."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from raw_server import RawServer, whole

import moondream_async as md

IMAGE = md.EncodedImage(b"\xff\xd8 as the server will not look", "image/jpeg", 8, 8)


def client_of(server, **options):
    """A client of a server, that tries once."""
    return md.MoondreamClient(endpoint=server.endpoint, **({"max_retries": 0} | options))


async def rounds(count=50):
    """Let everything run that can run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def refuses(method, given, message):
    """Call a method with arguments that can't be right; it is a coroutine or an iterator."""
    called = method(**given)
    with pytest.raises(md.RequestError, match=message):
        await (anext(called) if hasattr(called, "__anext__") else called)


def replying(*replies):
    """A server that gives these replies, one after the other, and the last one for ever."""
    waiting = list(replies)

    async def play(peer):
        while True:
            await peer.request()
            reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            await peer.send(reply if isinstance(reply, bytes) else whole(reply))

    return RawServer(play)


@asynccontextmanager
async def canned(*answers, **options):
    """Give a client, and the server that plays it one answer for each request."""

    async def play(peer):
        for answer in answers:
            await peer.request()
            await peer.send(answer)

    async with (
        RawServer(play) as server,
        md.MoondreamClient(endpoint=server.endpoint, **options) as client,
    ):
        yield client, server


@asynccontextmanager
async def played(play, **options):
    """Give a server that plays this on each connection, and a client of it, that tries once."""
    async with RawServer(play) as server, client_of(server, **options) as client:
        yield server, client
