"""Two things at once: readers, closers, loops and threads that end, and the garbage collector.

Whatever complains, by a warning or in the log, fails the test.
"""

import asyncio
import collections
import gc
import itertools
import logging
import random
import signal
import sys
import textwrap
import threading
import time

import anyio
import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer_all,
    event,
    head,
    in_chunks,
    stall,
    whole,
)
from test_cancel import stepping

import moondream_async as md
from moondream_async.simulator import SAMPLE_IMAGE


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
@pytest.mark.slow
async def test_client_is_closed_while_the_loop_of_another_thread_ends(grace):
    async def read(client, kept, turns):
        kept.append(await client.caption(IMAGE, stream=True))
        for _ in range(turns):
            await asyncio.sleep(0)

    choose = random.Random(5)
    async with RawServer(stall) as server:
        for _ in range(30):
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
        (pool,) = client._caller.session.transport._pools.values()
        ((kept, _),) = next(iter(pool._session.connector._conns.values()))
        kept.transport.close()  # as when the server has closed it
        pool._cut()
        await rounds()
        await server.until_idle()


# -- closing the client, at every await of every kind of call --------------------------

SEGMENT = (
    event(type="bbox", bbox={"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}),
    event("M 0 0", type="path_delta"),
    event(type="final", completed=True, path="M 0 0 Z"),
)
CHAT = (
    event(choices=[{"delta": {"content": "A cat"}}]),
    event(choices=[{"delta": {}, "finish_reason": "stop"}]),
    b"data: [DONE]\n\n",
)
MESSAGE = {"role": "assistant", "content": "A cat"}
ANSWERS = {  # by the last part of the address: plain, streamed
    "caption": (ANSWER, (*EVENTS, DONE)),
    "query": (ANSWER, (*EVENTS, DONE)),
    "detect": ({"objects": []}, ()),
    "point": ({"points": []}, ()),
    "segment": ({"path": "M 0 0 Z"}, SEGMENT),
    "completions": ({"choices": [{"message": MESSAGE, "finish_reason": "stop"}]}, CHAT),
    "models": ({"data": [{"id": "moondream3-preview"}]}, ()),
    "stats": ({"status": "ok"}, ()),
}
REFUSAL = {"error": "Streaming is not supported when reasoning is enabled"}


async def send_slowly(peer, *pieces):
    """Send it so that each piece has to be waited for."""
    for piece in pieces:
        await rounds(3)
        await peer.send(piece)


async def answer_slowly(peer):
    while True:
        request = await peer.request()
        plain, events = ANSWERS.get(request.target.rpartition("/")[2], (None, ()))
        said = request.json if request.body else {}
        if plain is None:
            await send_slowly(peer, whole({"detail": "Not Found"}, status="404 Not Found"))
        elif said.get("stream") and said.get("reasoning"):
            await send_slowly(peer, whole(REFUSAL, status="400 Bad Request"))
        elif said.get("stream"):
            chunks = [in_chunks(each, end=False) for each in events]
            await send_slowly(peer, STREAM_HEAD, *chunks, in_chunks())
        else:
            answer = whole(plain)
            await send_slowly(peer, answer[:20], answer[20:-5], answer[-5:])


def fail_before(play):
    """Refuse the request of one connection, lose that of the next, and play on the third."""
    turns = itertools.cycle(["refuse", "lose", "play"])

    async def begin(peer):
        turn = next(turns)
        if turn == "play":
            await play(peer)
        request = await peer.request()
        if turn == "lose" and request.body and request.json.get("stream"):
            await send_slowly(peer, STREAM_HEAD)
        else:
            await send_slowly(peer, head("Content-Length: 0", "Retry-After: 0", status="503 Busy"))

    return begin


async def read(call):
    async with call as stream:
        await stream.text()


async def read_events(call):
    stream = await call
    try:
        async for _ in stream.events:
            pass
    finally:
        await stream.aclose()


MESSAGES = [{"role": "user", "content": "What is this?"}]
KINDS = {
    "caption": lambda client: client.caption(IMAGE),
    "query": lambda client: client.query(IMAGE, "What?"),
    "query-without-a-picture": lambda client: client.query(question="What?"),
    "detect": lambda client: client.detect(IMAGE, "cat"),
    "point": lambda client: client.point(IMAGE, "cat"),
    "segment": lambda client: client.segment(IMAGE, "cat"),
    "chat": lambda client: client.chat(MESSAGES),
    "models": lambda client: client.models(),
    "health": lambda client: client.health(),
    "server_stats": lambda client: client.server_stats(),
    "encode_image": lambda client: client.encode_image(SAMPLE_IMAGE),
    "caption-of-a-file": lambda client: client.caption(SAMPLE_IMAGE),
    "caption-streamed": lambda client: read(client.caption(IMAGE, stream=True)),
    "query-streamed": lambda client: read(client.query(IMAGE, "What?", stream=True)),
    "reasoning-streamed": lambda client: read(
        client.query(IMAGE, "What?", stream=True, reasoning=True)
    ),
    "segment-streamed": lambda client: read_events(client.segment(IMAGE, "cat", stream=True)),
    "chat-streamed": lambda client: read_events(client.chat(MESSAGES, stream=True)),
}


def close_here(client):
    return asyncio.ensure_future(client.aclose())


def close_with_grace(client):
    return asyncio.ensure_future(client.aclose(grace=0.01))


def close_in_a_thread(client):
    return in_thread(client.aclose())


async def closing_done(closing):
    if isinstance(closing, threading.Thread):
        await joined(closing)
    else:
        await closing


# Every kind of call with either luck, and of the ways to close one after the other.
CLOSINGS = itertools.cycle([close_here, close_with_grace, close_in_a_thread])


@pytest.mark.parametrize(
    ("kind", "luck", "close"),
    [(kind, luck, next(CLOSINGS)) for luck in ("good", "bad") for kind in KINDS],
)
@pytest.mark.slow
async def test_client_closed_at_any_await_of_any_call_ends_it(kind, luck, close):
    play = answer_slowly if luck == "good" else fail_before(answer_slowly)
    clients, closings = [], []

    async def call():
        client = client_of(server, max_retries=3, rate_limit=1e6, max_connections=1)
        clients.append(client)
        await KINDS[kind](client)

    def strike(_waited_for):
        closings.append(close(clients[-1]))

    async with RawServer(play) as server:
        for at in range(1000):
            task = asyncio.ensure_future(stepped(call(), at, strike))
            await asyncio.wait([task])
            struck = bool(closings)
            for closing in closings:
                await closing_done(closing)
            closings.clear()
            await clients[-1].aclose()
            # What was in its last step may still come through, or fail by itself: health()
            # is asked once, and so not saved from a server that refuses.
            error = task.exception()
            assert error is None or isinstance(error, md.ClientClosedError | md.ServerError)
            stats = clients.pop().stats()
            assert (stats.open_streams, stats.waiting_calls) == (0, 0)
            if not struck:
                break
        await server.until_idle()


async def stepped(coroutine, at, strike):
    return await stepping(coroutine, at, strike)


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
    [
        (lambda client: client.stats(), 40),
        (lambda client: client._caller.session.count(requests=1, bytes_sent=2), 40),
        (in_a_loop_of_its_own, 100),
    ],
    ids=["stats", "count", "pool"],
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
    import asyncio, sys
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
    "asyncio": "asyncio.run(read())",
    "anyio": "anyio.run(read)",
    "several": """
        async def main():
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(read)
        asyncio.run(main())
    """,
    "a-task": """
        async def main():
            await asyncio.create_task(read())
        asyncio.run(main())
    """,
}


@pytest.mark.skipif(sys.platform == "win32", reason="no signal can be sent to one process there")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.slow
async def test_interrupt_in_the_middle_of_a_stream_leaves_nothing_and_says_no_more(
    reader, interruptible
):
    script = textwrap.dedent(READ) + textwrap.dedent(READERS[reader])
    async with RawServer(stall) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "dev", "-W", "error", "-c", script, server.endpoint),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert await process.stdout.readline() == b"A \n"
        process.send_signal(signal.SIGINT)
        await server.until_idle()
        said = (await process.stderr.read()).decode()
        assert await process.wait() != 0
    lines = said.splitlines()
    assert lines[-1] == "KeyboardInterrupt"
    complaints = ("Exception ignored", "Warning", "destroyed", "never", "nclosed")
    assert [line for line in lines if any(word in line for word in complaints)] == []


# -- all at once ----------------------------------------------------------------------

HAMMERING = 3  # seconds
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
