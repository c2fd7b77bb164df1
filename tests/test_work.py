"""How much work an event, a block, a stream and a call are, counted and not timed.

What is counted are the calls that this package's own code makes and gets, Python's and
C's: always the same on one Python, and on another nearly. The bounds stand a sixth over
what was counted on the Python that has most to do. Whoever passes one has made the
client slower, or knows why it is worth it, and moves the bound. Times are measured by
`benchmarks`.
"""

import contextlib
import gc
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest
from canned import played
from pictures import save
from PIL import Image
from raw_server import answer_all
from sources import Source, opened

import moondream_async as md
from moondream_async._transport.workers import ShortJobs, Workers

PACKAGE = str(Path(md.__file__).parent)
PICTURE = md.EncodedImage(b"a picture that nobody looks at", "image/jpeg", 8, 8)
DONE = b'data: {"completed": true, "request_id": "42"}\n\n'
CAPTION = 'data: {{"chunk": "grey heron {} ", "completed": false}}\n\n'
CHAT = (
    'data: {{"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": '
    '[{{"index": 0, "delta": {{"content": "grey heron {} "}}, "finish_reason": null}}]}}\n\n'
)
DIALECTS = {"caption": (CAPTION, DONE), "chat": (CHAT, b"data: [DONE]\n\n")}

PER_EVENT = 1.15  # 1.0 when it was set: to hand it out
PER_PACKET = 7  # 6, with no end of an event in it
PER_BLOCK = 24  # 23, with one event of a chat in it
PER_CALL = 170  # 147, a look whether its connection is quiet included
PER_PICTURE = 292  # 250, of a file, in a bulk run
PER_STREAM = 396  # 340, with four events in four blocks
PER_UNSAMPLED_CALL = 92  # 80, of them the metrics, which count all calls
BYTES_PER_STREAM = 2_200  # 1,890, without the connection's

both_dialects = pytest.mark.parametrize("skill", DIALECTS)


class Counter:
    calls = 0

    def __call__(self, frame, event, argument):
        # For calls of C, the frame is the caller's.
        if event in {"call", "c_call"} and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1


@contextlib.contextmanager
def counted():
    counter, before = Counter(), sys.getprofile()
    gc.disable()  # what was dropped elsewhere is not to be counted here
    sys.setprofile(counter)
    try:
        yield counter
    finally:
        sys.setprofile(before)
        gc.enable()


def packets(skill, events, per):
    event, done = DIALECTS[skill]
    made = [event.format(number).encode() for number in range(events)]
    return [b"".join(made[i : i + per]) for i in range(0, events, per)] + [done]


async def calls_to_read(skill, events, per):
    stream = opened(Source(*packets(skill, events, per)), skill=skill)
    with counted() as counter:
        pieces = [piece async for piece in stream]
    assert len(pieces) == events
    return counter.calls


@both_dialects
async def test_another_event_of_a_block_costs_hardly_more_than_to_hand_it_out(skill):
    few, many = await calls_to_read(skill, 3200, 16), await calls_to_read(skill, 6400, 32)
    assert (many - few) / 3200 <= PER_EVENT


@both_dialects
async def test_another_block_costs_no_more_calls_than_it_did(skill):
    few, many = await calls_to_read(skill, 100, 1), await calls_to_read(skill, 200, 1)
    assert (many - few) / 100 <= PER_BLOCK


@both_dialects
async def test_twice_the_events_take_twice_the_calls(skill):
    none, once, twice = [await calls_to_read(skill, 32 * n, 32) for n in (1, 101, 201)]
    assert twice - once == pytest.approx(once - none, rel=0.01)


async def test_another_packet_of_an_event_costs_no_more_calls_than_it_did():
    counts = []
    for number in (100, 200):
        event = CAPTION.format("x" * 100 * number).encode()
        cut = [event[i : i + 100] for i in range(0, len(event), 100)]
        stream = opened(Source(*cut, DONE))
        with counted() as counter:
            assert len(await stream.text()) == 100 * number + 12
        counts.append(counter.calls)
    assert (counts[1] - counts[0]) / 100 <= PER_PACKET


async def calls_of(act, times):
    """Return how many calls `act` takes when all has been done before."""
    await act()
    with counted() as counter:
        for _ in range(times):
            await act()
    return counter.calls / times


@pytest.fixture
async def asking():
    """A client of a server that answers at once."""
    async with played(answer_all) as (_, client):
        yield client


async def test_a_plain_call_takes_no_more_calls_than_it_did(asking):
    assert await calls_of(lambda: asking.caption(PICTURE), 10) <= PER_CALL


async def test_opening_a_stream_takes_no_more_calls_than_it_did(asking):
    async def read():
        return await (await asking.caption(PICTURE, stream=True)).text()

    assert await calls_of(read, 10) <= PER_STREAM


async def test_a_picture_of_a_bulk_run_takes_no_more_calls_than_it_did(asking, tmp_path):
    paths = [tmp_path / f"{number}.jpg" for number in range(200)]
    for path in paths:
        path.write_bytes(save(Image.new("RGB", (40, 30)), "JPEG"))

    async def run():
        async for each in asking.bulk(paths, "caption", concurrency=16):
            assert each.ok

    assert await calls_of(run, 1) / len(paths) <= PER_PICTURE


async def test_a_file_that_takes_long_holds_no_other_up():
    arrived, jobs = threading.Event(), ShortJobs(Workers("test", 4))
    await jobs.submit(lambda: "read")
    ours = [each for each in threading.enumerate() if each.name.startswith("moondream_async")]
    assert all(each.daemon for each in ours)  # the end of the program does not wait for them
    slow = jobs.submit(lambda: arrived.wait(60))
    try:
        assert await jobs.submit(lambda: "read") == "read"
        assert not slow.done()
    finally:
        arrived.set()
    assert await slow


async def test_an_open_stream_takes_no_more_memory_than_it_did():
    packet, *_ = packets("caption", 1, 1)

    async def open_all(sources):
        streams = [opened(source) for source in sources]
        for stream in streams:
            await anext(stream)
        return streams

    async def close(streams):
        for stream in streams:
            await stream.aclose()

    await close(await open_all([Source(packet)]))
    sources = [Source(packet) for _ in range(200)]
    gc.collect()
    tracemalloc.start()
    try:
        streams = await open_all(sources)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    await close(streams)
    assert used / len(streams) <= BYTES_PER_STREAM


@pytest.mark.parametrize(
    ("sampled", "bound"),
    [(None, 0), (False, PER_UNSAMPLED_CALL)],
    ids=["no tracing", "not sampled"],
)
async def test_tracing_that_nobody_looks_at_costs_nearly_nothing(asking, sampled, bound):
    pytest.importorskip("opentelemetry.sdk", reason="needs: python -m pip install '.[test]'")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    from moondream_async.integrations.otel import instrument

    without = await calls_of(lambda: asking.caption(PICTURE), 10)
    stop = instrument(asking, tracer_provider=TracerProvider(sampler=ALWAYS_OFF))
    if sampled is None:
        stop()
    assert await calls_of(lambda: asking.caption(PICTURE), 10) - without <= bound
