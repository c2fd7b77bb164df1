"""The slots of a client: as many as there are, to all in the order of asking, none lost.

What becomes of them across threads and closed loops, and the pace, is in `test_pace.py`.
"""

import asyncio
import contextlib
import io
import threading
from functools import partial

import anyio
import pytest
from canned import rounds
from hypothesis import given
from hypothesis import strategies as st
from raw_server import RawServer

import moondream_async as md
from moondream_async._call.limits import Semaphore
from moondream_async._transport.workers import ShortJobs, Workers
from moondream_async.simulator import SAMPLE_IMAGE


@pytest.mark.parametrize("meanwhile", [False, True], ids=["free", "freed by another thread"])
async def test_a_free_place_is_taken_without_waiting(meanwhile, monkeypatch):
    slots = Semaphore(2)
    if meanwhile:
        monkeypatch.setattr(slots, "try_acquire", lambda: False)
    assert [await slots.acquire(), await slots.acquire()] == [False, False]
    assert (slots.taken, slots.waiting) == (2, 0)


async def test_a_newcomer_does_not_overtake_the_line():
    slots = Semaphore(1)
    await slots.acquire()
    waiter = asyncio.create_task(slots.acquire())
    await rounds()

    slots.release()
    newcomer = asyncio.create_task(slots.acquire())  # before the waiter has woken up

    assert await waiter
    await rounds()
    assert not newcomer.done()
    slots.release()
    await newcomer


@pytest.mark.parametrize("given", [False, True], ids=["in line", "as a place is given"])
async def test_who_is_cancelled_holds_nobody_up(given):
    slots = Semaphore(1)
    await slots.acquire()
    first, second = (asyncio.create_task(slots.acquire()) for _ in range(2))
    await rounds()

    if given:
        slots.release()
    first.cancel()
    if not given:
        slots.release()

    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second
    slots.release()
    assert (slots.taken, slots.waiting) == (0, 0)


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["take", "give back", "rest"]), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 10)),
    ),
    max_size=60,
)


@given(total=st.integers(1, 3), steps=steps)
def test_whatever_happens_places_go_to_those_who_wait_in_their_order(total, steps):
    async def run():
        slots = Semaphore(total)
        line = []  # of all who asked, in order: the task, and whether it was cancelled
        served = []

        async def ask(number):
            await slots.acquire()
            served.append(number)

        held = 0
        for what, which in steps:
            if what == "take":
                await rounds()  # who was called has come; else one that asks now may say so first
                line.append(asyncio.create_task(ask(len(line))))
                await asyncio.sleep(0)  # it has asked
            elif what == "give back" and len(served) > held:
                held += 1
                slots.release()
            elif what == "cancel" and which < len(line):
                line[which].cancel()
            else:
                await rounds()
            assert len(served) - held <= total
            assert slots.taken <= total

        await rounds()
        assert served == sorted(served)
        assert slots.waiting == sum(not task.done() for task in line)
        assert slots.waiting == 0 or len(served) - held == total
        # Nothing is lost: with all slots given back, all who still wait are served.
        while len(served) > held:
            held += 1
            slots.release()
            await rounds()
        for task in line:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert (slots.taken, slots.waiting) == (0, 0)
        assert len(served) == sum(not task.cancelled() for task in line)

    asyncio.run(run())


class Photo(io.BytesIO):
    """Notes who reads it, and may have to wait."""

    def __init__(self, read, go_on=None):
        super().__init__(SAMPLE_IMAGE.read_bytes())
        self._read = read
        self._go_on = go_on

    def read(self, size=-1):
        self._read.append((self, threading.current_thread()))
        if self._go_on:
            self._go_on.wait()
        return super().read(size)


async def test_no_more_than_four_pictures_are_prepared_at_once():
    """Each may hold a decoded copy, whatever is asked for at once."""
    read, go_on = [], threading.Event()
    async with md.MoondreamClient(endpoint="http://127.0.0.1:9/v1") as client:
        photos = [Photo(read, go_on) for _ in range(9)]
        calls = [asyncio.ensure_future(client.encode_image(each)) for each in photos]
        while len(read) < 4:
            await asyncio.sleep(0)
        await rounds()
        at_work = {thread for _, thread in read}
        assert at_work == {each for each in threading.enumerate() if each.name == read[0][1].name}
        assert len(at_work) == 4
        go_on.set()
        assert {image.width for image in await asyncio.gather(*calls)} == {640}


async def test_no_more_than_eight_pictures_are_ready_before_their_turn():
    """Of calls that wait for one connection, most wait without a picture in memory."""
    read = []
    async with (
        RawServer(lambda peer: peer.until_gone()) as server,
        md.MoondreamClient(endpoint=server.endpoint, max_connections=1) as client,
        anyio.create_task_group() as calls,
    ):
        for _ in range(20):
            calls.start_soon(client.caption, Photo(read))
        while len({photo for photo, _ in read}) < 9:  # one that is being asked about, and those
            await asyncio.sleep(0)
        await rounds(1000)
        assert len({photo for photo, _ in read}) == 9
        calls.cancel_scope.cancel()


@pytest.mark.parametrize("has_thread", [False, True])
async def test_without_another_thread_a_picture_fails_or_waits_for_those_there_are(
    has_thread, monkeypatch
):
    workers, go_on = Workers("test", 4), threading.Event()
    if has_thread:
        first = workers.submit(go_on.wait)

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        second = workers.submit(str, 2)
        if not has_thread:
            with pytest.raises(RuntimeError, match="new thread"):
                await second
            assert await ShortJobs(workers).submit(partial(str, 3)) is None
    go_on.set()
    if has_thread:
        assert (await first, await second) == (True, "2")
    assert await workers.submit(str, 4) == "4"
