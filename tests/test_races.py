"""Two things at once: readers, closers, threads, Ctrl-C, and the garbage collector.

Whatever complains, by a warning or in the log, fails the test.
"""

import asyncio
import collections
import gc
import itertools
import random
import signal
import sys
import textwrap
import threading
import time

import anyio
import pytest
from canned import IMAGE, client_of, played, rounds
from forked import open_program
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    head,
    in_chunks,
    stall,
    whole,
)
from test_closing import in_thread, joined

import moondream_async as md


async def leave_open(peer):
    """Give the whole answer, but not the end of its body."""
    while True:
        await peer.request()
        await peer.send(STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False))
        await peer.next_byte()


pytestmark = pytest.mark.usefixtures("silence")


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


# -- the garbage collector ------------------------------------------------------------


@pytest.fixture
def collector():
    """It comes when it is told to."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what other tests have loaded takes a second for each look at it
    gc.disable()
    yield
    gc.set_threshold(*threshold)
    gc.enable()


def in_a_loop_of_its_own(client):
    """Make the client's pool for another loop."""

    async def make():
        client._caller.session.transport.pool()

    thread = in_thread(make())
    thread.join()


@pytest.mark.parametrize(
    ("act", "moments"),
    [(lambda client: client.stats(), 40), (in_a_loop_of_its_own, 60)],
    ids=["stats", "pool"],
)
@pytest.mark.filterwarnings("ignore:CaptionStream was dropped:ResourceWarning")
@pytest.mark.slow
async def test_stream_that_the_collector_finds_at_any_moment_is_closed(collector, act, moments):
    closed = []

    def note(event):  # a hook may ask for the numbers, too
        closed.append(client.stats().requests)

    async with played(stall, hooks=md.Hooks(end=note)) as (server, client):
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
            await asyncio.sleep(0)  # the hook is called in the loop of the call
            assert len(closed) == moment + 1
        await server.until_idle()
        assert client.stats().open_streams == 0


# -- Ctrl-C ---------------------------------------------------------------------------

READ = """
    import asyncio, sys, warnings
    warnings.simplefilter("error")
    import anyio
    import moondream_async as md

    image = md.EncodedImage(b"jpeg", "image/jpeg", 8, 8)

    async def read():
        async with md.MoondreamClient(endpoint=sys.argv[1]) as client:
            async with client.caption(image, stream=True) as stream:
                async for piece in stream:
                    print(piece, flush=True)
"""

READERS = {
    "one": "asyncio.run(read())",
    "several": """
        async def main():
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(read)
        asyncio.run(main())
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to one process there")
@pytest.mark.parametrize("reader", READERS)
async def test_interrupt_in_the_middle_of_a_stream_leaves_nothing_and_says_no_more(
    reader, interruptible
):
    script = textwrap.dedent(READ) + textwrap.dedent(READERS[reader])
    async with (
        RawServer(stall) as server,
        await open_program(["-c", script, server.endpoint]) as process,
    ):
        assert (await process.stdout.receive()).startswith(b"A \n")
        process.send_signal(signal.SIGINT)
        await server.until_idle()
        said = b"".join([data async for data in process.stderr]).decode()
        assert await process.wait() != 0
    lines = said.splitlines()
    assert lines[-1] == "KeyboardInterrupt"
    complaints = ("Exception ignored", "Warning", "destroyed", "never", "nclosed")
    assert [line for line in lines if any(word in line for word in complaints)] == []


# -- all at once ----------------------------------------------------------------------

HAMMERING = 2  # seconds
SEEDS = itertools.count()  # one for each connection


async def answer_or_fail(peer):
    """Answer most requests, and fail now and then in every way there is."""
    choose = random.Random(next(SEEDS))
    while True:
        request = await peer.request()
        fate = choose.random()
        if fate < 0.05:
            return
        if fate < 0.1:
            await peer.send(head("Content-Length: 0", "Retry-After: 0", status="503 Busy"))
        elif not request.wants_stream:
            await peer.send(whole(ANSWER))
        elif fate < 0.2:
            await peer.send(STREAM_HEAD + in_chunks(*EVENTS[: choose.randrange(4)], end=False))
            peer.reset()
        elif fate < 0.3:
            await peer.send(STREAM_HEAD + in_chunks(*EVENTS[: choose.randrange(1, 4)], end=False))
            await peer.until_gone()
        else:
            await peer.send(STREAM_HEAD)
            for each in (*EVENTS, DONE):
                await peer.send(in_chunks(each, end=False))
                await rounds(choose.randrange(3))
            await peer.send(in_chunks())


async def use_once(client, choose, tally):
    """Make one call and leave it in one of many ways."""
    way = choose.choice(["plain", "read", "break", "drop", "events", "cancel"])
    tally[way] += 1
    client.stats()
    if way == "plain":
        assert (await client.caption(IMAGE)).caption == TEXT
        return
    if way == "drop":
        stream = await client.caption(IMAGE, stream=True)
        await anext(stream)
        lost = [stream]
        lost.append(lost)
        return
    async with client.caption(IMAGE, stream=True) as stream:
        if way == "break":
            await anext(stream)
        elif way == "cancel":
            with anyio.move_on_after(choose.random() / 100):
                await stream.text()
        else:
            async for _ in stream if way == "read" else stream.events:
                await asyncio.sleep(0)
            assert stream.text_so_far == TEXT


async def hammer(client, seed, until, tally):
    choose = random.Random(seed)

    async def work(seed):
        choose = random.Random(seed)
        while time.monotonic() < until:
            try:
                await use_once(client, choose, tally)
            except md.MoondreamError as error:
                tally[type(error).__name__] += 1
            except StopAsyncIteration:
                tally["an empty answer"] += 1

    while time.monotonic() < until:  # a loop for some seconds each, cancelled in full swing
        tasks = [asyncio.ensure_future(work(choose.random())) for _ in range(8)]
        await asyncio.wait(tasks, timeout=choose.uniform(0.1, 0.4))
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.result()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CaptionStream was dropped:ResourceWarning")
async def test_four_threads_with_their_own_loops_share_one_client():
    tally = collections.Counter()
    failures = []
    timeout = md.Timeout(idle=0.1)
    async with RawServer(answer_or_fail) as server:
        client = client_of(server, max_connections=10, max_retries=2, timeout=timeout)
        until = time.monotonic() + HAMMERING

        def run_loops(seed):
            choose = random.Random(seed)
            try:
                while (now := time.monotonic()) < until:
                    end = min(until, now + choose.uniform(0.3, 1))
                    asyncio.run(hammer(client, choose.random(), end, tally))
            except BaseException as error:  # noqa: BLE001 - raised again in the test's own task
                failures.append(error)

        threads = [threading.Thread(target=run_loops, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await joined(thread)
        if failures:
            raise failures[0]
        gc.collect()
        await rounds()
        stats = client.stats()
        assert (stats.open_streams, stats.waiting_calls) == (0, 0)
        await client.aclose()
        await server.until_idle()
    print(dict(tally), stats)  # noqa: T201 - a figure, with -s
    assert all(tally[way] for way in ("plain", "read", "break", "drop", "events", "cancel"))
