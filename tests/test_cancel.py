"""However a call or a stream is left, nothing stays behind, and the server notices.

Garbage is not collected meanwhile: what is freed, is freed by reference counting.
"""

import asyncio
import gc
import sys
import types

import anyio
import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import (
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    WORDS,
    RawServer,
    answer,
    answer_all,
    head,
    in_chunks,
    listen,
    stall,
)
from test_leaving import CLOSING, named
from test_leaving import task as begun_and_cancelled

import moondream_async as md

BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(1_000_000), "image/jpeg", 8, 8)

# A server that goes on for ever, and one that says a word and then nothing.
ENDLESS = in_chunks(*EVENTS, end=False)


async def talk(peer):
    await peer.request()
    await peer.send(STREAM_HEAD)
    while True:
        await peer.send(ENDLESS)


@pytest.fixture(autouse=True)
def _no_garbage_collection(_nothing_left_open):
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=[talk, stall], ids=["endless", "stalled"])
async def server(request):
    async with RawServer(request.param) as server:
        yield server


def tasks_besides(server):
    """All tasks but this one, the server's, and those of anyio's test runner."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()} - server.tasks
    return {task for task in tasks if "TestRunner" not in task.get_coro().__qualname__}


async def assert_whole(client, server):
    """Nothing is under way, and nothing is held."""
    while tasks := tasks_besides(server):
        await asyncio.wait(tasks)
    await rounds()
    caller = client._caller
    assert (caller.session.slots.taken, caller.session.slots.waiting) == (0, 0)
    for pool in caller.session.transport._pools.values():
        assert (pool.calls, pool.bodies) == (set(), set())
        connector = pool._session.connector
        assert connector is None or connector._acquired == set()


async def assert_gone(server):
    """The server sees the end of every connection."""
    await server.until_idle()


# -- an open stream is left; `test_leaving.py` has more ways, and what is said of them ----


async def read_for_ever(stream):
    async for _ in stream:
        await asyncio.sleep(0)


async def cancel_its_reader(stream):
    await begun_and_cancelled(read_for_ever(stream))


async def close_it_under_its_reader(stream):
    reader = asyncio.ensure_future(read_for_ever(stream))
    await rounds()
    await stream.aclose()
    with pytest.raises(md.ClientClosedError, match="stream was closed"):
        await reader


@pytest.mark.parametrize(
    "leave", [*CLOSING, cancel_its_reader, close_it_under_its_reader], ids=named
)
async def test_stream_that_is_left_is_closed_and_the_server_sees_it(server, leave):
    async with client_of(server) as client:
        stream = await client.caption(IMAGE, stream=True)
        await leave(stream)
        await assert_gone(server)
        await assert_whole(client, server)
        with pytest.raises(md.ClientClosedError):
            await anext(stream)


@pytest.mark.parametrize("held", ["stream", "chunk"])
async def test_stream_that_is_dropped_is_closed_and_the_server_sees_it(server, held):
    async with client_of(server) as client:
        kept = await client.caption(IMAGE, stream=True)
        kept = kept if held == "stream" else kept.chunk  # which alone keeps its stream alive
        await anext(kept)
        with pytest.warns(ResourceWarning, match=r"CaptionStream was dropped .*test_cancel\.py:\d"):
            del kept
        await assert_gone(server)
        await assert_whole(client, server)


@pytest.mark.parametrize("entered", [False, True], ids=["closed", "left"])
@pytest.mark.parametrize("in_a_read", [False, True], ids=["between two reads", "in a read"])
async def test_closing_the_client_closes_its_streams(server, entered, in_a_read):
    client = client_of(server)
    stream = await client.caption(IMAGE, stream=True)
    await anext(stream)
    readers = [asyncio.ensure_future(read_for_ever(stream)) for _ in range(in_a_read)]
    await rounds()
    if entered:
        async with client:
            pass
    else:
        await client.aclose()
    for reading in (*readers, stream.text()):
        with pytest.raises(md.ClientClosedError):
            await reading
    await assert_gone(server)
    await assert_whole(client, server)


async def test_dropped_stream_and_client_are_closed_where_warnings_are_errors(server, monkeypatch):
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: raised.append(type(args.exc_value)))
    client = client_of(server)
    stream = await client.caption(IMAGE, stream=True)
    await stream.__anext__()
    del client, stream
    await assert_gone(server)
    assert raised == [ResourceWarning] * 2


async def test_two_hundred_streams_cancelled_at_once_leave_nothing():
    async def read():
        async with client.caption(IMAGE, stream=True) as stream:
            opened.append(stream.request_id)
            await read_for_ever(stream)

    opened = []
    async with played(stall, max_connections=200) as (server, client):
        tasks = [asyncio.ensure_future(read()) for _ in range(200)]
        while len(opened) < 200:
            await rounds(1)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}
        await assert_gone(server)
        await assert_whole(client, server)
        assert len(server.peers) == 200


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("image", [IMAGE, BIG_IMAGE], ids=["small", "big"])
async def test_call_cancelled_before_its_answer_is_closed(stream, image):
    async with RawServer(listen) as server, client_of(server) as client:
        for _ in range(5):
            call = asyncio.ensure_future(client.caption(image, stream=stream))
            while not server.requests:
                await rounds(1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await assert_gone(server)
            await assert_whole(client, server)
            server.peers.clear()


async def test_upload_cancelled_half_way_is_closed():
    async def play(peer):
        await peer.request_head()
        begun.set()
        await cancelled.wait()  # reading no more, so that the upload stands still
        await peer.until_gone()

    image = md.EncodedImage(b"\xff\xd8" + bytes(30_000_000), "image/jpeg", 8, 8)
    begun, cancelled = asyncio.Event(), asyncio.Event()
    async with RawServer(play) as server, client_of(server) as client:
        call = asyncio.ensure_future(client.caption(image))
        await begun.wait()
        await rounds(1000)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        cancelled.set()
        await assert_gone(server)
        await assert_whole(client, server)


# -- at every await -------------------------------------------------------------------


@types.coroutine
def stepping(coroutine, at, interrupt):
    """Run a coroutine; where it waits for the `at`-th time, call `interrupt` with the future.

    Returns what the coroutine returns. It is run by the event loop as always: the
    futures that it waits for are handed on, and the loop's answers handed back.
    """
    resume, argument, count = coroutine.send, None, 0
    while True:
        try:
            waited_for = resume(argument)
        except StopIteration as end:
            return end.value
        if count == at:
            interrupt(waited_for)
        count += 1
        try:
            argument = yield waited_for
        except BaseException as error:  # noqa: BLE001 - it goes where it belongs
            resume, argument = coroutine.throw, error
        else:
            resume = coroutine.send


async def run_stepping(coroutine, at, interrupt):
    return await stepping(coroutine, at, interrupt)


def cancel_while_it_waits(_waited_for, task):
    task.cancel()


def cancel_as_it_goes_on(waited_for, task):
    """Cancel in the moment between the future's result and the task's next step."""
    if waited_for is None:
        task.cancel()
    else:
        waited_for.add_done_callback(lambda _: task.cancel())


async def interrupted_everywhere(make, interrupt):
    """Run `make()` again and again, each time interrupted one wait later; yield the tasks."""
    for at in range(1000):
        reached = []

        def strike(waited_for, reached=reached):
            reached.append(True)
            interrupt(waited_for, asyncio.current_task())

        task = asyncio.ensure_future(run_stepping(make(), at, strike))
        await asyncio.wait([task])
        yield task, bool(reached)
        if not reached:
            return


async def answer_in_pieces(peer):
    """Answer slowly enough that everything has to be waited for."""
    while True:
        request = await peer.request()
        if not request.wants_stream:
            await rounds(3)
            await peer.send(head("Content-Length: 40", "Content-Type: application/json"))
            await rounds(3)
            await peer.send(b'{"caption": "A cat sleeps."}'.ljust(40))
            continue
        for piece in (STREAM_HEAD, *[in_chunks(each, end=False) for each in (*EVENTS, DONE)]):
            await rounds(3)
            await peer.send(piece)
        await rounds(3)
        await peer.send(in_chunks())


def fail_every_other():
    """Refuse one request and answer the next."""
    refuse = [True]

    async def play(peer):
        while True:
            await peer.request() if refuse[0] else await answer(peer)
            refuse[0] = not refuse[0]
            if not refuse[0]:
                await peer.send(head("Content-Length: 0", "Retry-After: 0", status="503 Busy"))

    return play


def lose_every_other():
    """Lose one stream before its first event and answer the next."""
    lose = [True]

    async def play(peer):
        while True:
            lose[0] = not lose[0]
            if lose[0]:
                await answer(peer)
            else:
                await peer.request()
                await peer.send(STREAM_HEAD)
                return

    return play


async def read_plain(client):
    assert (await client.caption(IMAGE)).caption == TEXT


async def read_photo(client):
    """The picture is prepared in a thread."""
    from moondream_async.simulator import SAMPLE_IMAGE

    assert (await client.caption(SAMPLE_IMAGE)).caption == TEXT


async def read_big(client):
    assert (await client.caption(BIG_IMAGE)).caption == TEXT


async def read_entered(client):
    async with client.caption(IMAGE, stream=True) as stream:
        assert await stream.text() == TEXT


async def read_awaited(client):
    stream = await client.caption(IMAGE, stream=True)
    try:
        assert [piece async for piece in stream] == list(WORDS)
    finally:
        await stream.aclose()


async def read_a_word(client):
    async with client.caption(IMAGE, stream=True) as stream:
        assert await anext(stream) == WORDS[0]


async def read_in_line(client):
    """The only place is taken, for a while, by another call."""
    other = asyncio.ensure_future(client.caption(IMAGE))
    await asyncio.sleep(0)
    try:
        await read_entered(client)
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


# What is called, what the server plays, and the client's options.
CALLS = {
    "plain": (read_plain, lambda: answer_in_pieces, {}),
    "photo": (read_photo, lambda: answer_in_pieces, {}),
    "big": (read_big, lambda: answer_in_pieces, {}),
    "entered": (read_entered, lambda: answer_in_pieces, {}),
    "awaited": (read_awaited, lambda: answer_in_pieces, {}),
    "one-word": (read_a_word, lambda: answer_in_pieces, {}),
    "in-line": (read_in_line, lambda: answer_in_pieces, {"max_connections": 1}),
    "paced": (read_entered, lambda: answer_all, {"rate_limit": 1000}),
    "plain-again": (read_plain, fail_every_other, {"max_retries": 1}),
    "entered-again": (read_entered, fail_every_other, {"max_retries": 1}),
    "lost-and-again": (read_entered, lose_every_other, {"max_retries": 1}),
}


@pytest.fixture(params=CALLS)
async def call(request):
    """What to call, a client, and its server."""
    read, play, options = CALLS[request.param]
    async with RawServer(play()) as server, client_of(server, **options) as client:
        yield read, client, server


@pytest.mark.parametrize("cancel", [cancel_while_it_waits, cancel_as_it_goes_on])
@pytest.mark.slow
async def test_call_cancelled_at_any_await_leaves_everything_whole(call, cancel):
    read, client, server = call
    async for task, reached in interrupted_everywhere(lambda: read(client), cancel):
        assert task.cancelled() is reached
        await assert_whole(client, server)
        await read(client)  # and the next call works


async def test_call_cancelled_by_a_scope_at_any_await_leaves_everything_whole(call):
    read, client, server = call
    scopes = []

    async def read_in_scope():
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await read(client)

    def cancel(_waited_for, _task):
        scopes[-1].cancel()

    async for task, reached in interrupted_everywhere(read_in_scope, cancel):
        task.result()  # the scope has caught it, if there was still something to cancel
        assert reached or not scopes[-1].cancelled_caught
        await assert_whole(client, server)
        await read(client)


@pytest.mark.parametrize("cancel", [cancel_while_it_waits, cancel_as_it_goes_on])
async def test_reading_cancelled_at_any_await_closes_the_stream(cancel):
    async with RawServer(answer_in_pieces) as server, client_of(server) as client:
        streams = []

        async def read():
            return await streams[-1].text()

        streams.append(await client.caption(IMAGE, stream=True))
        async for task, reached in interrupted_everywhere(read, cancel):
            assert task.cancelled() is reached
            stream = streams[-1]
            if stream.completed:
                assert await stream.text() == TEXT
            else:
                assert TEXT.startswith(stream.text_so_far)
                with pytest.raises(md.ClientClosedError, match="cancelled"):
                    await stream.text()
            await assert_whole(client, server)
            streams.append(await client.caption(IMAGE, stream=True))
        await streams[-1].aclose()
        await assert_whole(client, server)


# -- closing the client ---------------------------------------------------------------


@pytest.mark.parametrize("grace", [None, 60])
@pytest.mark.parametrize("cancel", [cancel_while_it_waits, cancel_as_it_goes_on])
async def test_closing_cancelled_at_any_await_closes_all_the_same(cancel, grace):
    at = 0
    reached = True
    async with RawServer(stall) as server:
        while reached:
            reached = False

            def strike(waited_for):
                nonlocal reached
                reached = True
                cancel(waited_for, asyncio.current_task())

            client = client_of(server)
            stream = await client.caption(IMAGE, stream=True)
            await anext(stream)
            closing = asyncio.ensure_future(run_stepping(client.aclose(grace), at, strike))
            await rounds()
            if cancel is cancel_as_it_goes_on or not reached:
                await stream.aclose()  # so that there is nothing to wait for any more
            await asyncio.wait([closing])
            assert closing.cancelled() is reached
            with pytest.raises(md.ClientClosedError):
                await stream.text()
            await assert_gone(server)
            await assert_whole(client, server)
            at += 1
    assert at > 1


async def test_closing_at_once_ends_the_grace_of_closing_before():
    async with RawServer(stall) as server:
        client = client_of(server)
        stream = await client.caption(IMAGE, stream=True)
        patient = asyncio.ensure_future(client.aclose(grace=60))
        await rounds()
        assert await anext(stream) == WORDS[0]
        await client.aclose()
        await patient
        with pytest.raises(md.ClientClosedError):
            await stream.text()
        await assert_gone(server)


async def test_closing_with_grace_lets_finish_what_is_under_way():
    async with RawServer(answer_in_pieces) as server:
        client = client_of(server)
        stream = await client.caption(IMAGE, stream=True)
        plain = asyncio.ensure_future(client.caption(IMAGE))
        opening = asyncio.ensure_future(client.caption(IMAGE, stream=True))
        await rounds(2)
        closings = [asyncio.ensure_future(client.aclose(grace=60)) for _ in range(2)]
        await rounds(2)
        with pytest.raises(md.ClientClosedError):
            await client.caption(IMAGE)
        assert (await plain).caption == TEXT
        assert await stream.text() == TEXT
        assert not any(closing.done() for closing in closings)
        assert await (await opening).text() == TEXT
        await asyncio.wait(closings)
        await assert_gone(server)


async def test_closing_with_grace_ends_what_takes_longer():
    async with RawServer(stall) as server:
        client = client_of(server)
        stream = await client.caption(IMAGE, stream=True)
        await client.aclose(grace=0.01)
        with pytest.raises(md.ClientClosedError):
            await stream.text()
        await assert_gone(server)
