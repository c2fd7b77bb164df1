"""Servers that send what a test hands them, and what our client makes of it."""

from contextlib import asynccontextmanager

from raw_server import RawServer

import moondream_async as md


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
