"""Two things at once: readers, closers, loops and threads that end, and the garbage collector.

Whatever complains, by a warning or in the log, fails the test.
"""

import asyncio
import gc
import logging

import pytest
from raw_server import (
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    in_chunks,
)

import moondream_async as md

IMAGE = md.EncodedImage(b"\xff\xd8 as the server will not look", "image/jpeg", 8, 8)


def client_of(server, **options):
    return md.MoondreamClient(endpoint=server.endpoint, **({"max_retries": 0} | options))


async def rounds(count=20):
    """Let everything run that can run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def stall(peer):
    """Say a word and then nothing."""
    await peer.request()
    await peer.send(STREAM_HEAD + in_chunks(EVENTS[0], end=False))
    await peer.until_gone()


async def leave_open(peer):
    """Give the whole answer, but not the end of its body."""
    while True:
        await peer.request()
        await peer.send(STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False))
        await peer.next_byte()


@pytest.fixture(autouse=True)
def _silence(_nothing_left_open, caplog):
    """No log record, and, once all garbage is gone, no warning."""
    yield
    gc.collect()
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


# -- on one stream --------------------------------------------------------------------


@pytest.mark.parametrize("first", ["read", "close"])
@pytest.mark.parametrize("second", ["read", "close"])
async def test_complete_stream_is_ended_by_two_tasks_at_once(first, second):
    ways = {"read": lambda stream: stream.text(), "close": lambda stream: stream.aclose()}
    async with RawServer(leave_open) as server, client_of(server) as client:
        stream = await client.caption(IMAGE, stream=True)
        while not stream.completed:
            await anext(stream)
        one, two = (asyncio.ensure_future(ways[way](stream)) for way in (first, second))
        await asyncio.wait([one, two])
        if first == second == "read":
            assert "already reading" in str(two.exception())
        else:
            two.result()
        one.result()
        if "read" in (first, second):
            assert stream.text_so_far == TEXT
        assert client.stats().open_streams == 0
