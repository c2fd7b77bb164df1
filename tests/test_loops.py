"""One client, several event loops: one after the other, at once, closed by hand.

The server runs in a thread and a loop of its own. Whatever complains, by a warning
or in the log, fails the test.
"""

import asyncio
import contextlib
import gc
import logging
import sys
import threading
from functools import partial

import anyio
import pytest
from canned import IMAGE, client_of, rounds
from raw_server import TEXT, answer_all
from remote_server import answer_then_stall, serving

import moondream_async as md
from moondream_async._transport import workers


@pytest.fixture
def server():
    with serving(answer_all) as server:
        yield server


@pytest.fixture
def stalling():
    with serving(answer_then_stall) as server:
        yield server


@pytest.fixture(autouse=True)
def _silence(silence, caplog):
    """No log record, and, once all garbage is gone, no warning."""
    caplog.set_level(logging.WARNING)  # asyncio tells of its selector at a lower one


@pytest.fixture(autouse=True)
def _no_threads_left(_silence, monkeypatch):
    monkeypatch.setattr(workers, "_KEPT", 0.01)  # seconds; 37 times two of them are long
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)  # one that prepares pictures waits a while for its next
        assert not thread.is_alive(), thread


@pytest.fixture(params=["asyncio", "uvloop"])
def _kind_of_loop(request):
    if request.param == "asyncio":
        yield
        return
    uvloop = pytest.importorskip("uvloop", reason="needs: python -m pip install '.[loops]'")
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield
    asyncio.set_event_loop_policy(before)


# Where loops end, or wake each other. Not where a loop is closed by hand with connections in it:
# of that uvloop itself complains.
in_each_kind_of_loop = pytest.mark.usefixtures("_kind_of_loop")


async def call_both_ways(client, times=3):
    for _ in range(times):
        assert (await client.caption(IMAGE)).caption == TEXT
        async with client.caption(IMAGE, stream=True) as stream:
            assert await stream.text() == TEXT


# -- one after the other --------------------------------------------------------------


@in_each_kind_of_loop
def test_client_serves_several_runs(server, photo):
    client = client_of(server)
    runs = (asyncio.run, partial(asyncio.run, debug=True), lambda made: anyio.run(lambda: made))
    for number, run in enumerate(runs):
        run(call_both_ways(client))
        run(client.encode_image(photo))
        server.wait_until_idle()  # its connections went with their loop
        assert len(server.server.peers) == number + 1
    asyncio.run(client.aclose(), debug=True)


@in_each_kind_of_loop
def test_streams_and_readers_left_at_the_end_of_a_run_end_with_it(stalling):
    client = client_of(stalling)
    kept, readers = [], []

    async def leave_two():
        kept.append(await client.caption(IMAGE, stream=True))
        await anext(kept[-1])
        stream = await client.caption(IMAGE, stream=True)
        readers.append(asyncio.ensure_future(stream.text()))
        await rounds(2)

    for _ in range(3):
        asyncio.run(leave_two())
        assert readers[-1].cancelled()
        stalling.wait_until_idle()
    assert repr(client).endswith("0 open>")
    asyncio.run(client.aclose())
    for stream in kept:
        assert stream.text_so_far == "A "
        with pytest.raises(md.ClientClosedError):
            asyncio.run(stream.text())


def test_client_made_inside_a_run_and_dropped_warns_once_and_no_more(server):
    async def forget():
        await call_both_ways(client_of(server))

    with pytest.warns(ResourceWarning) as caught:
        asyncio.run(forget())
    assert ["MoondreamClient was dropped" in str(each.message) for each in caught] == [True]
    server.wait_until_idle()


# -- at once --------------------------------------------------------------------------


def in_threads(number, work):
    """Run `work(index)` in so many threads at once; raise what one of them raises."""
    failures = []

    def run(index):
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


@in_each_kind_of_loop
def test_client_serves_the_loops_of_several_threads_at_once(server, photo):
    client = client_of(server, max_connections=3)  # fewer than are asked for at once

    async def work():
        await asyncio.gather(*[call_both_ways(client) for _ in range(4)])
        assert (await client.caption(photo)).caption == TEXT

    in_threads(4, lambda _: [asyncio.run(work()) for _ in range(2)])
    assert repr(client).endswith("0 open>")
    server.wait_until_idle()
    asyncio.run(client.aclose())


@in_each_kind_of_loop
def test_closing_from_any_loop_closes_the_streams_of_all(stalling):
    client = client_of(stalling)
    opened = threading.Barrier(4)

    async def read():
        stream = await client.caption(IMAGE, stream=True)
        assert await anext(stream) == "A "
        reader = asyncio.ensure_future(stream.text())
        await asyncio.to_thread(opened.wait)
        with pytest.raises(md.ClientClosedError):
            await reader
        with pytest.raises(md.ClientClosedError):
            await client.caption(IMAGE)
        await client.aclose()

    async def close():
        await asyncio.to_thread(opened.wait)
        await client.aclose()
        await client.aclose()

    in_threads(4, lambda index: asyncio.run(close() if index == 3 else read()))
    stalling.wait_until_idle()


def test_closing_from_another_loop_may_leave_time_to_finish(server):
    client = client_of(server)
    opened, closing = threading.Event(), threading.Event()

    async def read():
        stream = await client.caption(IMAGE, stream=True)
        opened.set()
        await asyncio.to_thread(closing.wait)
        assert await stream.text() == TEXT

    async def close():
        await asyncio.to_thread(opened.wait)
        task = asyncio.ensure_future(client.aclose(grace=60))
        await asyncio.sleep(0)
        closing.set()
        await task

    in_threads(2, lambda index: asyncio.run(close() if index else read()))
    server.wait_until_idle()


@pytest.fixture
def quick_switches():
    """Threads take turns as often as can be, so that they meet in every place."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_calls_that_begin_as_the_client_is_closed_leave_nothing_open(server, quick_switches):
    async def call(client):
        with contextlib.suppress(md.ClientClosedError):
            while True:
                await client.caption(IMAGE)

    async def work(index, client, start, closed):
        start.wait()
        if index:
            await call(client)  # and then the loop lives on: only the client closes connections
            await asyncio.to_thread(closed.wait)
        else:
            await client.aclose()
            try:
                await asyncio.to_thread(server.wait_until_idle)
            finally:
                closed.set()

    for _ in range(30):
        arguments = (client_of(server), threading.Barrier(4), threading.Event())
        in_threads(4, lambda index, each=arguments: asyncio.run(work(index, *each)))


# -- loops closed by hand -------------------------------------------------------------


def test_loop_closed_by_hand_with_idle_connections_is_dropped_in_silence(server):
    client = client_of(server)
    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(call_both_ways(client))
        loop.close()
        del loop
        gc.collect()
    asyncio.run(call_both_ways(client))
    server.wait_until_idle()
    del client  # so that it has no loop any more


@pytest.mark.parametrize("after", ["another call", "close", "drop"])
def test_loop_closed_by_hand_with_an_open_stream_is_dropped_in_silence(stalling, after):
    client = client_of(stalling, max_connections=1)
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(client.caption(IMAGE, stream=True))
    assert loop.run_until_complete(stream.__anext__()) == "A "
    loop.close()
    if after == "another call":  # which gets the place of the one that is gone
        assert asyncio.run(client.caption(IMAGE)).caption == TEXT
    if after == "drop":
        with pytest.warns(ResourceWarning, match="CaptionStream was dropped"):
            del stream
    else:
        asyncio.run(client.aclose())
        assert stream.text_so_far == "A "
    stalling.wait_until_idle()
    asyncio.run(client.aclose())


@pytest.mark.parametrize("gone", [False, True], ids=["rests", "is gone"])
def test_stream_dropped_while_its_loop_rests_or_after_it_is_reported_and_closed(stalling, gone):
    ended = []
    client = client_of(stalling, hooks=md.Hooks(end=ended.append))
    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(client.caption(IMAGE, stream=True))
    if gone:
        loop.close()
    with pytest.warns(ResourceWarning, match="CaptionStream was dropped"):
        del stream
    loop.close()
    stalling.wait_until_idle()
    assert [event.completed for event in ended] == [False]
    asyncio.run(client.aclose())


@in_each_kind_of_loop
def test_client_closed_while_a_loop_rests_leaves_that_loop_usable(stalling):
    loop = asyncio.new_event_loop()
    for _ in range(5):
        client = client_of(stalling)
        loop.run_until_complete(client.caption(IMAGE))
        stream = loop.run_until_complete(client.caption(IMAGE, stream=True))
        asyncio.run(client.aclose())
        stalling.wait_until_idle()
        with pytest.raises(md.ClientClosedError):
            loop.run_until_complete(stream.text())
    loop.close()


@pytest.mark.parametrize(
    ("then", "_kind_of_loop"),
    [("goes on", "asyncio"), ("goes on", "uvloop"), ("is closed", "asyncio")],
    indirect=["_kind_of_loop"],
)
@in_each_kind_of_loop
def test_client_dropped_while_a_loop_rests_is_closed_with_what_becomes_of_it(server, then):
    client = client_of(server)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.caption(IMAGE))
    with pytest.warns(ResourceWarning, match="MoondreamClient was dropped"):
        del client
    if then == "goes on":
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        server.wait_until_idle()
    loop.close()
    del loop
    gc.collect()
    server.wait_until_idle()


def test_place_in_line_of_a_loop_that_is_gone_goes_to_the_next(server):
    client = client_of(server, max_connections=1)
    loop = asyncio.new_event_loop()

    async def stand_in_line():
        task = asyncio.ensure_future(client.caption(IMAGE))
        await asyncio.sleep(0)
        return task

    async def work():
        stream = await client.caption(IMAGE, stream=True)
        task = await asyncio.to_thread(loop.run_until_complete, stand_in_line())
        loop.close()
        next_in_line = asyncio.ensure_future(client.caption(IMAGE))
        await asyncio.sleep(0)
        assert await stream.text() == TEXT
        assert (await next_in_line).caption == TEXT
        task._log_destroy_pending = False  # whose fault that is, is clear here
        await client.aclose()

    asyncio.run(work())


# -- loops that are not asyncio's own -------------------------------------------------


class MuteTimers(asyncio.SelectorEventLoop):
    """Its timers do not say when they go off; nor do qasync's."""

    def call_at(self, when, callback, *args, context=None):
        handle = asyncio.Handle(callback, args, self, context)
        super().call_at(when, lambda: handle.cancelled() or handle._run())
        return handle


def test_timer_that_does_not_tell_its_time_is_enough(server):
    async def work():
        async with client_of(server, timeout=md.Timeout(total=60)) as client:
            await call_both_ways(client)

    loop = MuteTimers()
    loop.run_until_complete(work())
    loop.close()
