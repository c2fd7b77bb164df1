"""Two things at once: readers, closers, loops and threads that end, and the garbage collector.

Whatever complains, by a warning or in the log, fails the test.
"""

import asyncio
import gc
import logging
import random
import threading

import pytest
from raw_server import (
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer_all,
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


# -- between loops --------------------------------------------------------------------


def in_thread(coroutine):
    """Run in a loop and a thread of its own, which is returned."""
    thread = threading.Thread(target=asyncio.run, args=(coroutine,))
    thread.start()
    return thread


async def joined(thread):
    while thread.is_alive():
        await asyncio.sleep(0)


@pytest.mark.parametrize("grace", [None, 60], ids=["at-once", "with-grace"])
async def test_client_is_closed_while_the_loop_of_another_thread_ends(grace):
    async def read(client, kept, turns):
        kept.append(await client.caption(IMAGE, stream=True))
        for _ in range(turns):
            await asyncio.sleep(0)

    choose = random.Random(5)
    async with RawServer(stall) as server:
        for _ in range(100):
            kept = []
            client = client_of(server)
            thread = in_thread(read(client, kept, choose.randrange(12)))
            while not kept:
                await asyncio.sleep(0)
            await rounds(choose.randrange(3))
            await client.aclose(grace)
            await joined(thread)
            with pytest.raises(md.ClientClosedError):
                await kept[0].text()
        await server.until_idle()


async def test_closing_does_not_wait_for_a_loop_that_rests():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    async with RawServer(stall) as server:
        client = client_of(server)
        thread.start()
        opening = asyncio.run_coroutine_threadsafe(client.caption(IMAGE, stream=True), loop)
        stream = await asyncio.wrap_future(opening)
        closing = asyncio.ensure_future(client.aclose(grace=3600))
        await rounds()
        loop.call_soon_threadsafe(loop.stop)
        await joined(thread)
        await closing
        await server.until_idle()
        with pytest.raises(md.ClientClosedError):
            await stream.text()
        loop.close()


def test_client_in_a_generator_that_nobody_finished_is_closed_with_its_loop():
    async def captions(endpoint):
        async with md.MoondreamClient(endpoint=endpoint) as client:
            while True:
                yield (await client.caption(IMAGE)).caption

    async def main():
        async with RawServer(answer_all) as server:
            generators = [captions(server.endpoint) for _ in range(20)]
            for generator in generators:
                assert await anext(generator) == TEXT
            return generators

    asyncio.run(main())


async def test_idle_connection_that_is_just_being_closed_is_left_to_itself():
    async with RawServer(answer_all) as server, client_of(server) as client:
        await client.caption(IMAGE)
        (pool,) = client._caller.transport._pools.values()
        ((kept, _),) = next(iter(pool._session.connector._conns.values()))
        kept.transport.close()  # as when the server has closed it
        pool._cut()
        await rounds()
        await server.until_idle()


# -- the garbage collector ------------------------------------------------------------


@pytest.fixture
def collector():
    """It comes when it is told to."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what is there already need not be looked through every time
    gc.disable()
    yield
    gc.set_threshold(*threshold)
    gc.enable()
    gc.unfreeze()


def in_a_loop_of_its_own(client):
    """Make the client's pool for another loop."""

    async def make():
        client._caller.transport.pool()

    thread = in_thread(make())
    thread.join()


@pytest.mark.parametrize(
    ("act", "moments"),
    [
        (lambda client: client.stats(), 40),
        (lambda client: client._caller.count(requests=1, bytes_sent=2), 40),
        (in_a_loop_of_its_own, 400),
    ],
    ids=["stats", "count", "pool"],
)
@pytest.mark.filterwarnings("ignore:CaptionStream was dropped:ResourceWarning")
async def test_stream_that_the_collector_finds_at_any_moment_is_closed(collector, act, moments):
    closed = []

    def note(event):  # a hook may ask for the numbers, too
        closed.append(client.stats().requests)

    async with (
        RawServer(stall) as server,
        client_of(server, hooks=md.Hooks(end=note)) as client,
    ):
        for moment in range(moments):
            gc.collect()
            lost = [await client.caption(IMAGE, stream=True)]
            lost.append(lost)
            del lost
            gc.set_threshold(moment + 1)  # of new objects, at which it comes
            gc.enable()
            act(client)
            gc.disable()
            gc.collect()
            assert len(closed) == moment + 1
        await server.until_idle()
        assert client.stats().open_streams == 0
