"""What can be seen of a client at work: log lines, numbers, hooks; and what the budget stops."""

import asyncio
import contextlib
import functools
import io
import logging
import runpy
import sys
import threading

import pytest
from canned import canned
from programs import running
from raw_server import whole

import moondream_async as md
from moondream_async._call import report
from moondream_async.simulator import Fault, Simulator

KEY = "md-0123456789-secret"  # no local: these are shown below


@pytest.fixture
def told():
    """Hooks, and the list that they write to."""
    events = []

    def tell(kind, event):
        assert asyncio.get_running_loop()
        events.append((kind, event))

    kinds = ("request", "first_chunk", "retry", "end")
    return md.Hooks(**{kind: functools.partial(tell, kind) for kind in kinds}), events


async def in_bulk(client, photo):
    assert [done.ok async for done in client.bulk([photo], "caption")] == [True]


async def in_batch(client, photo):
    batch = await client.batches.create([md.BatchRequest.caption(photo)])
    done = await client.batches.wait(batch, interval=0.001)
    assert [each.ok async for each in client.batches.results(done)] == [True]


HI = [{"role": "user", "content": "Hi"}]
CALLS = {  # and how many calls they are, or None where the server's pace decides
    "caption": (lambda it, photo: it.caption(photo), 1),
    "models": (lambda it, photo: it.models(), 1),
    "query, streamed": (lambda it, photo: it.query(photo, "Why?", stream=True), 1),
    "segment, streamed": (lambda it, photo: it.segment(photo, "red", stream=True), 1),
    "chat, streamed": (lambda it, photo: it.chat(HI, stream=True), 1),
    "bulk": (in_bulk, 1),
    "batch": (in_batch, None),
}


@pytest.mark.parametrize(("call", "count"), CALLS.values(), ids=CALLS)
async def test_hooks_are_told_in_order_of_whatever_is_asked(photo, told, call, count):
    hooks, events = told
    async with (
        Simulator(rate=0) as simulator,
        md.MoondreamClient("key", endpoint=simulator.endpoint, hooks=hooks) as client,
    ):
        simulator.faults.append("status=503,times=2,retry_after=0")
        answer = await call(client, photo)
        if isinstance(answer, md.Stream):
            await answer.text()
    calls = {}
    for kind, event in events:
        calls.setdefault(event.call_id, []).append((kind, event))
    assert count is None or len(calls) == count
    told_first, *rest = [[kind for kind, _ in each] for each in calls.values()]
    first_chunk = ["first_chunk"] * isinstance(answer, md.Stream)
    assert told_first == ["request", "retry"] * 2 + ["request", *first_chunk, "end"]
    assert all(each == ["request", "end"] for each in rest)
    for each in calls.values():
        seconds = [event.seconds for _, event in each]
        assert seconds == sorted(seconds)
        assert each[-1][1].outcome == "complete"
    attempts = [(event.attempt, event.delay, type(event.error)) for _, event in events[:5]]
    again = (0, md.ServerError)
    no = (None, type(None))
    assert attempts == [(1, *no), (1, *again), (2, *no), (2, *again), (3, *no)]


async def test_hooks_are_told_of_each_frame_that_is_watched(simulator, photo, told):
    hooks, events = told
    async with md.MoondreamClient(endpoint=simulator.endpoint, hooks=hooks) as client:
        assert [each.ok async for each in client.watch([photo], "caption", stream=True)] == [True]
    assert [kind for kind, _ in events] == ["request", "end"]


@pytest.fixture
async def talker():
    """A server that says at the end of a stream how it was."""
    async with Simulator("kestrel", rate=0) as simulator:
        yield simulator


WAYS = {
    "complete": ("complete", None),
    "plain": ("complete", None),
    "closed": ("abandoned", None),
    "dropped": ("abandoned", None),
    "dropped-elsewhere": ("abandoned", None),
    "cut": ("interrupted", md.StreamInterruptedError),
    "refused": ("failed", md.BadRequestError),
    "no-picture": ("failed", md.ImageError),
    "cancelled": ("cancelled", asyncio.CancelledError),
}
FAULTS = {"cut": "cut=2", "cancelled": "slow_start=60", "refused": "status=400"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:CaptionStream was dropped:ResourceWarning")
async def test_an_end_is_told_once_however_it_comes(talker, photo, told, way):
    hooks, events = told
    simulator = talker
    simulator.faults.extend(Fault.parse(FAULTS[way]) for _ in range(way in FAULTS))
    outcome, error = WAYS[way]
    threads = []
    noted = md.Hooks(
        request=hooks.request,
        end=lambda event: (threads.append(threading.current_thread()), hooks.end(event)),
    )
    async with md.MoondreamClient(endpoint=simulator.endpoint, hooks=noted) as client:
        if way == "cancelled":
            call = asyncio.create_task(client.caption(photo))
            while not events:
                await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        elif way in ("plain", "refused", "no-picture"):
            with contextlib.suppress(md.MoondreamError):
                await client.caption(b"none" if way == "no-picture" else photo)
        else:
            held = [await client.caption(photo, stream=True)]
            if way == "closed":
                await held[0].aclose()
                await held[0].aclose()
            elif way == "dropped":
                held.clear()
            elif way == "dropped-elsewhere":
                await asyncio.get_running_loop().run_in_executor(None, held.clear)
                await asyncio.sleep(0)
            else:
                for _ in range(2):
                    with contextlib.suppress(md.StreamInterruptedError):
                        await held[0].text()
    (end,) = [event for kind, event in events if kind == "end"]
    assert threads == [threading.current_thread()]
    assert (end.outcome, end.completed) == (outcome, outcome == "complete")
    assert end.error is None if error is None else isinstance(end.error, error)
    assert {event.call_id for _, event in events} == {end.call_id}
    assert (end.endpoint, end.model, end.skill) == (client.endpoint, None, "caption")
    assert end.attempt == (way != "no-picture")
    if outcome == "complete":
        assert end.finish_reason == "stop"
        assert end.input_tokens > 0
        assert end.output_tokens > 0
        assert client.stats().bytes_sent == end.bytes_sent > photo.stat().st_size
        assert end.bytes_received > 0
        assert (end.ttft is not None) == (way == "complete")


@pytest.mark.parametrize(
    ("count", "expected"), [("0", 0), ("9" * 400, None), ("-1", None), ("true", None)]
)
async def test_a_count_of_tokens_that_makes_no_sense_is_none(photo, told, count, expected):
    metrics = f'{{"input_tokens": {count}, "output_tokens": 7}}'
    body = f'{{"caption": "a cat", "metrics": {metrics}}}'
    hooks, events = told
    async with canned(whole(body.encode()), hooks=hooks) as (client, _):
        assert (await client.caption(photo)).caption == "a cat"
    end = events[-1][1]
    assert (end.input_tokens, end.output_tokens, end.outcome) == (expected, 7, "complete")
    assert end.bytes_received == len(body)


async def test_calls_at_once_are_told_apart(simulator, photo, told):
    hooks, events = told
    async with md.MoondreamClient(endpoint=simulator.endpoint, hooks=hooks, model="m") as client:
        await asyncio.gather(*[client.caption(photo) for _ in range(5)])
        await client.models()
    assert len({event.call_id for _, event in events}) == 6
    assert [event.model for _, event in events if event.skill] == ["m"] * 10


async def test_a_closing_client_lets_a_call_between_two_attempts_finish(simulator, photo):
    between = asyncio.Event()
    simulator.faults.append(Fault.parse("status=503,times=1,retry_after=0.05"))
    hooks = md.Hooks(retry=lambda _: between.set())
    client = md.MoondreamClient(endpoint=simulator.endpoint, hooks=hooks)
    call = asyncio.create_task(client.caption(photo))
    await between.wait()
    await client.aclose(grace=10)
    assert (await call).caption


async def test_other_peoples_work_in_the_loops_threads_holds_up_no_call(simulator, photo):
    loop, release = asyncio.get_running_loop(), threading.Event()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(50)]
    endpoint = simulator.endpoint.replace("127.0.0.1", "localhost")
    try:
        async with md.MoondreamClient(endpoint=endpoint) as client:
            assert (await client.caption(photo)).caption
    finally:
        release.set()
        await asyncio.wait(busy)


async def test_pictures_that_are_prepared_slowly_take_no_connection(simulator, photo):
    release, running, most = threading.Event(), set(), []

    class Slow(io.BytesIO):
        def read(self, *size):
            running.add(self)
            most.append(len(running))
            release.wait()
            running.discard(self)
            return super().read(*size)

    async with md.MoondreamClient(
        endpoint=simulator.endpoint, max_connections=10, timeout=md.Timeout(pool=0.05)
    ) as client:
        image = await client.encode_image(photo)
        slow = [asyncio.create_task(client.caption(Slow(photo.read_bytes()))) for _ in range(10)]
        try:
            while len(running) < 4:
                await asyncio.sleep(0.001)
            for task in slow[:3]:  # what has begun goes on, and nobody takes its thread
                task.cancel()
            assert (await client.caption(image)).caption
            assert client.stats().open_streams == 0
        finally:
            release.set()
        done = await asyncio.gather(*slow, return_exceptions=True)
        assert [type(each) for each in done[:3]] == [asyncio.CancelledError] * 3
        assert all(isinstance(each, md.CaptionResult) for each in done[3:])
    assert max(most) <= 4


async def test_a_hook_that_raises_is_logged_and_disturbs_nothing(simulator, photo, caplog):
    def broken(event):
        raise ZeroDivisionError

    hooks = md.Hooks(request=broken, end=broken)
    async with md.MoondreamClient(endpoint=simulator.endpoint, hooks=hooks) as client:
        assert (await client.caption(photo)).caption
    failed = [record.name for record in caplog.records if record.levelno >= logging.ERROR]
    assert failed == ["moondream_async"] * 2


async def test_a_request_and_a_retry_are_a_debug_line_each(client, simulator, photo, caplog):
    simulator.faults.append(Fault.parse("status=503,times=1,retry_after=0"))
    with caplog.at_level(logging.DEBUG, logger="moondream_async"):
        await client.caption(photo)
    lines = [record.getMessage() for record in caplog.records if record.name == "moondream_async"]
    assert [line.split(" in ")[0] for line in lines] == [
        "POST /caption: 503",
        "retry 1 of 3",
        "POST /caption: 200",
    ]
    assert "base64" not in caplog.text


async def test_stats_count_what_was_done_what_is_open_and_who_waits(simulator, photo):
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_connections=1) as client:
        nothing = dict.fromkeys(md.ClientStats.fields(), 0)
        assert client.stats() == md.ClientStats(**nothing)
        simulator.faults.append(Fault.parse("status=503,times=1,retry_after=0"))
        async with client.caption(photo, stream=True) as stream:
            assert client.stats().open_streams == 1
            call = asyncio.create_task(client.caption(photo))
            while not client.stats().waiting_calls:
                await asyncio.sleep(0)
            await stream.text()
        assert (await call).caption
        stats = client.stats()
    assert (stats.open_streams, stats.requests, stats.retries) == (0, 3, 1)
    assert (stats.waiting_calls, stats.pooled_connections) == (0, 1)
    assert stats.bytes_sent > 3 * photo.stat().st_size  # base64 adds a third
    assert stats.bytes_received > len(stream.text_so_far)


async def test_an_answer_keeps_words_that_are_the_key_too(simulator, photo):
    plain = md.MoondreamClient("measurements", endpoint=simulator.endpoint)
    async with plain as client:
        assert "measurements" in (await client.caption(photo)).caption
        stream = await client.caption(photo, stream=True)
        assert "measurements" in await stream.text()
        simulator.faults.append("json")
        stream = await client.caption(photo, stream=True)
        assert "measurements" in await stream.text()


@pytest.mark.parametrize(
    ("given", "level"), [(" info", "INFO"), ("debug", "DEBUG"), ("loud", "NOTSET"), ("", "NOTSET")]
)
def test_environment_says_what_is_logged(given, level, monkeypatch):
    log = logging.getLogger("moondream_async")
    monkeypatch.setenv("MOONDREAM_LOG", given)
    try:
        runpy.run_path(report.__file__)
        assert logging.getLevelName(log.level) == level
    finally:
        log.setLevel(logging.NOTSET)


async def test_environment_switches_the_log_on(simulator, photo):
    simulator.faults.append("status=503,retry_after=0")
    program = f"""
import asyncio, moondream_async as md
async def main():
    async with md.MoondreamClient() as client:
        await client.caption({str(photo)!r})
asyncio.run(main())
"""
    environment = {"MOONDREAM_LOG": "debug", "MOONDREAM_ENDPOINT": simulator.endpoint}
    async with running(sys.executable, "-c", program, **environment) as process:
        status, _, said = await process.end()

    assert status == 0
    assert {line.split()[3] for line in said if "moondream_async" in line} == {"INFO", "DEBUG"}
    assert all("call " in line for line in said if "POST" in line)
