"""Closing the client: at once or with grace, while it is cancelled, and from another loop."""

import asyncio
import random
import threading

import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import TEXT, WORDS, RawServer, answer_all, stall
from test_everywhere import CancelAsItGoesOn, CancelTheTask, answer_slowly, stepping

import moondream_async as md

pytestmark = pytest.mark.usefixtures("silence")


@pytest.mark.parametrize("grace", [None, 60])
@pytest.mark.parametrize("strike", [CancelTheTask, CancelAsItGoesOn])
async def test_closing_cancelled_at_any_await_closes_all_the_same(strike, grace):
    async with RawServer(stall) as server:
        for at in range(1000):
            client = client_of(server)
            fate = strike(client)
            stream = await client.caption(IMAGE, stream=True)
            await anext(stream)
            closing = asyncio.ensure_future(stepping_as_a_coroutine(client.aclose(grace), at, fate))
            await rounds()
            if strike is CancelAsItGoesOn or not fate.fell:
                await stream.aclose()  # so that there is nothing to wait for any more
            await asyncio.wait([closing])
            assert closing.cancelled() is fate.fell
            with pytest.raises(md.ClientClosedError):
                await stream.text()
            await server.until_idle()
            if not fate.fell:
                break
    assert at > 0


async def stepping_as_a_coroutine(coroutine, at, interrupt):
    return await stepping(coroutine, at, interrupt)


async def test_closing_at_once_ends_the_grace_of_closing_before():
    async with played(stall) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        patient = asyncio.ensure_future(client.aclose(grace=60))
        await rounds()
        assert await anext(stream) == WORDS[0]
        await client.aclose()
        await patient
        with pytest.raises(md.ClientClosedError):
            await stream.text()
        await server.until_idle()


async def test_closing_with_grace_lets_finish_what_is_under_way():
    async with played(answer_slowly) as (server, client):
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
        await server.until_idle()


async def test_closing_with_grace_ends_what_takes_longer():
    async with played(stall) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        await client.aclose(grace=0.01)
        with pytest.raises(md.ClientClosedError):
            await stream.text()
        await server.until_idle()


# -- between loops


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
        for _ in range(20):
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
