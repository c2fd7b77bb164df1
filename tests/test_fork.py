"""A process that is forked while a client is in use: the child begins anew, the parent goes on."""

import asyncio
import os
import signal
import time

import pytest
from canned import IMAGE, played
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    WORDS,
    RawServer,
    in_chunks,
    stall,
    whole,
)

import moondream_async as md

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


async def in_a_child(act, when_stopped=None, new_loop=asyncio.new_event_loop):
    """Run `act` in a forked child, in a loop of its own; return what it returned, as text.

    Where the child stops itself, `when_stopped` is run before it goes on.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        said = "nothing"
        try:
            asyncio.events._set_running_loop(None)
            with asyncio.Runner(loop_factory=new_loop) as runner:
                said = str(runner.run(act()))
        except BaseException as error:  # noqa: BLE001 - the parent is told
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    loop = asyncio.get_running_loop()
    _, status = await loop.run_in_executor(None, os.waitpid, child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        try:
            await when_stopped()
        finally:
            os.kill(child, signal.SIGCONT)
            await loop.run_in_executor(None, os.waitpid, child, 0)
    try:
        return os.read(reading, 10_000).decode()
    finally:
        os.close(reading)


@pytest.mark.parametrize("what", ["use", "read", "close", "drop", "nothing"])
async def test_child_leaves_the_streams_of_its_parent_alone(what):
    go_on = asyncio.Event()

    async def play(peer):
        while True:
            request = await peer.request()
            if not request.wants_stream:
                await peer.send(whole(ANSWER))
                continue
            await peer.send(STREAM_HEAD + in_chunks(EVENTS[0], end=False))
            await go_on.wait()
            await peer.send(in_chunks(*EVENTS[1:], DONE))

    async with RawServer(play) as server:
        client = md.MoondreamClient(endpoint=server.endpoint)
        stream = await client.caption(IMAGE, stream=True)
        pieces = [await anext(stream)]
        kept = [await client.caption(IMAGE)]

        async def act():
            nonlocal stream
            began = time.monotonic()
            assert client.stats().open_streams == client.stats().pooled_connections == 0
            if what == "use":
                kept.append(await client.caption(IMAGE))
            if what == "read":
                with pytest.raises(md.ClientClosedError):
                    await anext(stream)
            if what == "drop":
                del stream
            if what in ("use", "close"):
                await client.aclose()
            return f"done in {time.monotonic() - began < 3}"

        assert await in_a_child(act) == "done in True"
        go_on.set()
        pieces += [piece async for piece in stream]
        assert "".join(pieces) == TEXT
        assert (await client.caption(IMAGE)).caption == TEXT
        await client.aclose()
        await server.until_idle()


async def test_stream_that_the_parent_closes_ends_for_the_server_though_a_child_lives():
    async with played(stall) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        await anext(stream)

        async def stop():
            os.kill(os.getpid(), signal.SIGSTOP)

        async def close():
            await stream.aclose()
            await server.until_idle()

        assert await in_a_child(stop, close) == "None"


async def test_child_prepares_pictures_in_threads_of_its_own(photo):
    async with md.MoondreamClient(endpoint="http://127.0.0.1:9/v1") as client:
        await client.encode_image(photo)

        async def act():
            return (await client.encode_image(photo)).width

        assert await in_a_child(act) == "640"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_answer_that_arrived_while_the_process_was_frozen_is_in_time(loop):
    """It is read before anybody looks at the clock, streamed or not."""
    new_loop = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    limit, stopped, arrived = 0.5, asyncio.Event(), asyncio.Semaphore(0)
    is_asked, tell = os.pipe()

    async def play(peer):
        request = await peer.request()
        if request.wants_stream:
            await peer.send(STREAM_HEAD + in_chunks(EVENTS[0], end=False))
        os.write(tell, b"x")
        await stopped.wait()
        rest = in_chunks(*EVENTS[1:], DONE) if request.wants_stream else whole(ANSWER)
        await peer.send(rest)
        arrived.release()
        await peer.until_gone()

    async def act():
        timeout = md.Timeout(first_event=limit, idle=limit)
        async with md.MoondreamClient(
            endpoint=server.endpoint, timeout=timeout, max_retries=0
        ) as client:
            stream = await client.caption(IMAGE, stream=True)
            first = await anext(stream)
            reading = asyncio.create_task(stream.text())
            asking = asyncio.create_task(client.caption(IMAGE))
            for _ in range(2):
                await asyncio.get_running_loop().run_in_executor(None, os.read, is_asked, 1)
            os.kill(os.getpid(), signal.SIGSTOP)
            return first, await reading, (await asking).caption

    async def thaw():
        stopped.set()
        for _ in range(2):
            await arrived.acquire()
        await asyncio.sleep(limit * 1.2)  # of the clock that the child goes by

    async with RawServer(play) as server:
        said = await in_a_child(act, thaw, new_loop)
    os.close(is_asked)
    os.close(tell)
    assert said == str((WORDS[0], TEXT, TEXT))
