"""Moving pictures: the newest frame wins, results keep their order, and nothing is left behind."""

import asyncio
import io
import itertools
import queue
import threading

import anyio
import anyio.lowlevel
import pytest
from PIL import Image

import moondream_async as md
from moondream_async.simulator import SAMPLE_IMAGE
from moondream_async.watch import Frame, WatchResult


class Picture(io.BytesIO):
    """A picture of its own, in a file that tells when it is read."""

    def __init__(self, number=0, looked_at=None):
        super().__init__()
        size, colour = (8 + number % 50, 8), (number * 7 % 256, 80, 20)
        Image.new("RGB", size, colour).save(self, "JPEG")
        self.seek(0)
        self._told = (set() if looked_at is None else looked_at, number)

    def read(self, *size):
        looked_at, number = self._told
        looked_at.add(number)
        return super().read(*size)


class Camera:
    """A source that gives a frame when the test says so; the test knows when it was taken."""

    def __init__(self):
        self.looked_at = set()
        self._frames = asyncio.Queue()

    async def show(self, *numbers):
        """Give frames, and return when the watch has dealt with all of them."""
        for number in numbers:
            picture = Picture(number, self.looked_at)
            self._frames.put_nowait(Frame(picture, number / 30, number))
            await self._frames.join()

    def end(self):
        self._frames.put_nowait(None)

    async def __aiter__(self):
        while True:
            frame = await self._frames.get()
            try:
                if frame is None:
                    return
                yield frame  # comes back when the next is wanted
            finally:
                self._frames.task_done()


class Reader:
    """Reads a watch in a task of its own, as the loop of a program does."""

    def __init__(self, watch):
        self.results = []
        self._watch = watch
        self._task = asyncio.create_task(self._read())
        self._more = asyncio.Event()

    async def _read(self):
        try:
            async for each in self._watch:
                self.results.append(each)
                self._more.set()
        finally:
            self._more.set()

    async def until(self, count):
        """Wait for so many results; return their indices."""
        while len(self.results) < count and not self._task.done():
            self._more.clear()
            await self._more.wait()
        return [each.index for each in self.results]

    async def end(self):
        await self._task
        return [each.index for each in self.results]


async def result_of(watch, camera, number):
    """Show a frame while the watch is read; return what comes of it."""
    reading = asyncio.create_task(anext(watch))
    await camera.show(number)
    return await reading


@pytest.fixture
def camera():
    return Camera()


@pytest.fixture
async def held(simulator):
    """Answers that wait for the test, in the order in which they are asked for."""
    return [simulator.script.caption(f"Frame {n}.", hold_after=0) for n in range(8)]


async def asked(simulator, count):
    await simulator.wait_until(
        lambda: sum(r.held or r.ended.is_set() for r in simulator.requests) >= count
    )


# -- the newest frame ------------------------------------------------------------------


async def test_the_newest_frame_is_asked_about_next_and_no_other_is_encoded(
    simulator, client, camera, held
):
    async with client.watch(camera, "caption") as watch:
        reader = Reader(watch)
        await camera.show(0)
        await asked(simulator, 1)
        await camera.show(*range(1, 10))
        held[0].release()
        await asked(simulator, 2)
        held[1].release()
        assert await reader.until(2) == [0, 9]
    first, second = reader.results
    assert (first.skipped, second.skipped) == (0, 8)
    assert (watch.frames, watch.skipped, watch.dropped) == (10, 8, 0)
    assert second.frame.index == 9
    assert second.result.caption == "Frame 1."
    assert len(simulator.requests) == 2
    assert simulator.requests[1].images == [Picture(9).getvalue()]
    assert camera.looked_at == {0, 9}


async def test_every_result_tells_its_frame_and_its_age(client, camera):
    async with client.watch(camera) as watch:
        results = [await result_of(watch, camera, number) for number in range(3)]
    assert all(isinstance(each, WatchResult) and each.ok for each in results)
    assert [each.frame.index for each in results] == [0, 1, 2]
    assert all(0 < each.age < 60 for each in results)
    taken = [each.taken_at for each in results]
    assert taken == sorted(taken)


@pytest.mark.parametrize("kind", ["list", "generator", "asynchronous"])
async def test_the_last_frame_is_always_asked_about(client, kind):
    async def later():
        for number in range(20):
            yield Picture(number)

    frames = {
        "list": lambda: [Picture(number) for number in range(20)],
        "generator": lambda: (Picture(number) for number in range(20)),
        "asynchronous": later,
    }[kind]()
    results = [each async for each in client.watch(frames)]
    indices = [each.index for each in results]
    assert indices == sorted(set(indices))
    assert (indices[0], indices[-1]) == (0, 19)
    assert sum(each.skipped + 1 for each in results) == 20


async def test_a_frame_is_chosen_only_when_its_call_has_a_connection_slot(simulator, camera):
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_connections=1) as client:
        stream = await client.caption(SAMPLE_IMAGE, stream=True)
        async with client.watch(camera, in_flight=3) as watch:
            reader = Reader(watch)
            for number in range(6):
                await camera.show(number)
                assert client.stats().waiting_calls == 1
            assert camera.looked_at == set()
            await stream.text()
            assert await reader.until(1) == [5]
    assert camera.looked_at == {5}
    assert (watch.frames, watch.skipped, reader.results[0].skipped) == (6, 5, 5)
    assert len(simulator.requests) == 2


async def test_no_connection_slot_in_time_is_the_error_of_the_newest_frame(simulator, camera):
    async with (
        md.MoondreamClient(
            endpoint=simulator.endpoint, max_connections=1, timeout=md.Timeout(pool=0.05)
        ) as client,
        client.caption(SAMPLE_IMAGE, stream=True),
        client.watch(camera) as watch,
    ):
        reading = asyncio.create_task(anext(watch))
        await camera.show(0, 1)
        each = await reading
    assert each.index == watch.frames - 1
    assert (each.error.phase, each.ok) == ("pool", False)


async def test_nothing_is_asked_while_nobody_reads(simulator, client, camera):
    async with client.watch(camera, in_flight=2) as watch:
        await anyio.wait_all_tasks_blocked()
        assert watch.frames == 0
        await result_of(watch, camera, 0)
        await camera.show(1, 2, 3)
        await anyio.wait_all_tasks_blocked()
        assert len(simulator.requests) == 1
        assert (await anext(watch)).index == 3
        assert len(simulator.requests) == 2


# -- several at once --------------------------------------------------------------------


async def test_results_come_in_order_and_those_that_come_too_late_are_dropped(
    simulator, client, camera, held
):
    async with client.watch(camera, in_flight=3) as watch:
        reader = Reader(watch)
        for number in range(3):
            await camera.show(number)
            await asked(simulator, number + 1)
        assert watch.in_flight == 3
        held[1].release()
        await reader.until(1)
        held[0].release()
        await simulator.wait_until(simulator.requests[0].ended.is_set)
        held[2].release()
        assert await reader.until(2) == [1, 2]
    assert [each.skipped for each in reader.results] == [1, 0]
    assert (watch.skipped, watch.dropped) == (0, 1)


async def test_an_answer_that_is_too_old_is_dropped(simulator, client, camera, held):
    async with client.watch(camera, max_age=1e-6) as watch:
        reader = Reader(watch)
        await camera.show(0)
        held[0].release()
        await camera.show(1)
        held[1].release()
        camera.end()
        assert await reader.end() == []
    assert watch.dropped + watch.skipped == 2


async def test_a_new_frame_cancels_the_oldest_with_supersede(simulator, client, camera, held):
    async with client.watch(camera, supersede=True) as watch:
        reader = Reader(watch)
        await camera.show(0)
        await asked(simulator, 1)
        await camera.show(1)
        await simulator.wait_until(lambda: simulator.requests[0].disconnected)
        await asked(simulator, 2)
        held[1].release()
        assert await reader.until(1) == [1]
    assert (watch.skipped, watch.dropped) == (1, 0)


# -- streams ------------------------------------------------------------------------------


async def test_each_result_may_be_a_stream(client, camera):
    texts = []
    async with client.watch(camera, "caption", stream=True) as watch:
        for number in range(3):
            each = await result_of(watch, camera, number)
            assert isinstance(each.result, md.CaptionStream)
            texts.append("".join([piece async for piece in each.result.chunk]))
            assert each.result.completed
    assert texts == [(await client.caption(Picture(number))).caption for number in range(3)]


async def test_the_next_result_and_leaving_close_a_stream_that_was_left(simulator, client, camera):
    for _ in range(2):
        simulator.script.caption(["A", " red", " cat"], hold_after=1)
    async with client.watch(camera, stream=True) as watch:
        for number in range(2):
            assert await anext((await result_of(watch, camera, number)).result) == "A"
        await simulator.wait_until(lambda: simulator.requests[0].disconnected)
        assert not simulator.requests[1].disconnected
    await simulator.wait_until(lambda: simulator.requests[1].disconnected)


async def test_a_stream_that_a_frame_supersedes_just_ends(simulator, client, camera):
    simulator.script.caption(["A", " red", " cat"], hold_after=1)
    async with client.watch(camera, stream=True, supersede=True) as watch:
        stream = (await result_of(watch, camera, 0)).result
        assert await anext(stream) == "A"
        rest = asyncio.create_task(anext(stream, "the end"))
        await anyio.wait_all_tasks_blocked()
        await camera.show(1)
        assert await rest == "the end"
        assert (stream.text_so_far, stream.completed) == ("A", False)
        assert (await anext(watch)).index == 1


# -- frames that block ----------------------------------------------------------------------


class BlockingCamera:
    """The same, for a program without an event loop: its reader blocks."""

    def __init__(self):
        self.frames = queue.Queue()
        self.threads = set()

    def __iter__(self):
        while True:
            self.threads.add(threading.current_thread())
            frame = self.frames.get()
            if frame is None:
                return
            yield frame


async def test_frames_that_block_are_read_in_a_thread_of_their_own(client):
    camera = BlockingCamera()
    async with client.watch(camera) as watch:
        for number in range(3):
            camera.frames.put(Picture(number))
            assert (await anext(watch)).skipped == 0
        camera.frames.put(None)
        assert await anext(watch, None) is None
    assert camera.threads.isdisjoint({threading.current_thread()})


async def test_neither_leaving_nor_the_interpreter_waits_for_an_iterator_that_blocks(client):
    camera = BlockingCamera()
    async with client.watch(camera) as watch:
        camera.frames.put(Picture())
        await anext(watch)
        (thread,) = camera.threads
    assert thread.is_alive()  # in the iterator
    assert thread.daemon  # so that the interpreter may end
    camera.frames.put(Picture())
    await asyncio.to_thread(thread.join)


@pytest.mark.parametrize("kind", ["ordinary", "asynchronous"])
async def test_an_iterable_that_is_always_ready_is_no_busy_loop(simulator, client, held, kind):
    taken = itertools.count()

    async def later():
        for number in taken:
            yield Picture(number)

    ordinary = (Picture(number) for number in taken)
    async with client.watch(later() if kind == "asynchronous" else ordinary) as watch:
        reader = Reader(watch)
        await asked(simulator, 1)
        turns, before = 0, watch.frames
        while watch.frames < before + 50:
            await asyncio.sleep(0)
            turns += 1
        assert turns > 100  # the loop had time for others between two frames, and not one turn
        held[0].release()
        await reader.until(1)


# -- errors -----------------------------------------------------------------------------------


async def test_a_failure_is_a_result_and_the_next_frame_is_asked_about(simulator, client, camera):
    simulator.script.caption(fault="status=503,retry_after=0")
    async with client.watch(camera) as watch:
        failed, good = [await result_of(watch, camera, number) for number in range(2)]
    assert isinstance(failed.error, md.ServerError)
    assert (failed.ok, failed.result, failed.index) == (False, None, 0)
    assert failed.error.__traceback__ is None
    assert good.ok
    assert len(simulator.requests) == 2  # a frame is not tried again


async def test_after_a_failure_the_newest_frame_waits_for_the_pause(simulator, client, camera):
    simulator.script.caption(fault="status=503,retry_after=0.5")
    async with client.watch(camera) as watch:
        reader = Reader(watch)
        await camera.show(0)
        await reader.until(1)
        await camera.show(1, 2, 3)
        camera.end()
        assert await reader.end() == [0, 3]
    assert simulator.requests[0].ended_at + 0.4 < simulator.requests[1].ended_at


async def test_a_failure_may_end_the_watch(simulator, client, camera):
    simulator.script.caption(fault="status=503")
    async with client.watch(camera, on_error="raise") as watch:
        with pytest.raises(md.ServerError):
            await result_of(watch, camera, 0)
        with pytest.raises(StopAsyncIteration):
            await anext(watch)
