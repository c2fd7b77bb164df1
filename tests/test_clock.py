"""The limits of a stream: which one runs out when, and what does not count.

Time is the tests' own, so that each happens at its second.
"""

import asyncio

import pytest
from decoding import sse
from sources import (
    DONE,
    END,
    HERON,
    TEXT,
    Source,
    opened,
)

import moondream_async as md

pytestmark = pytest.mark.own_time


async def fails_at(stream, clock, cls, start):
    """Read until it fails; return the error, and after how many seconds."""
    with pytest.raises(cls) as caught:
        await stream.text()
    return caught.value, clock.now - start


async def test_first_event_is_the_limit_until_anything_comes(clock):
    source = Source()
    stream = opened(source, timeout=md.Timeout(first_event=5, idle=2))

    error, seconds = await fails_at(stream, clock, md.APITimeoutError, clock.now)

    assert (error.phase, seconds) == ("first_event", 5)
    assert not isinstance(error, md.StreamError)
    assert "did not begin within 5 seconds (Timeout.first_event)" in error.message
    assert source.closed


async def test_what_opening_took_counts_towards_the_first_event(clock):
    stream = opened(Source(), timeout=md.Timeout(first_event=5), waited=3.0)

    _, seconds = await fails_at(stream, clock, md.APITimeoutError, clock.now)

    assert seconds == 2


async def test_idle_is_the_limit_between_two_events(clock):
    source = Source(4, sse(HERON[0]), 1.5, sse(HERON[1]))
    stream = opened(source, timeout=md.Timeout(first_event=5, idle=2))

    error, seconds = await fails_at(stream, clock, md.StreamStalledError, clock.now)

    assert (error.phase, error.partial, seconds) == ("idle", "A grey heron ", 7.5)
    assert "Nothing came for 2 seconds (Timeout.idle)" in error.message
    assert source.closed


@pytest.mark.parametrize(
    "script",
    [[], [sse(HERON[0])], [sse(HERON[0]), 6, sse(HERON[1])]],
    ids=["before the first event", "between two events", "later"],
)
async def test_total_is_the_limit_of_all(clock, script):
    total = md.Timeout(first_event=20, idle=20, total=10)
    stream = opened(Source(*script), timeout=total, total_at=clock.now + 10)

    error, seconds = await fails_at(stream, clock, md.StreamStalledError, clock.now)

    assert (error.phase, seconds) == ("total", 10)
    assert "not complete within 10 seconds (Timeout.total)" in error.message
    assert error.partial == stream.text_so_far


@pytest.mark.parametrize(
    "packet",
    [b": ping\n\n", b":\n", b"\n", b"event: mood\n\n", b"retry: 100\n\n", b" ", b"data: "],
    ids=["comment", "bare colon", "blank", "no data", "retry", "half", "half data"],
)
@pytest.mark.parametrize(
    ("before", "phase", "seconds"),
    [([], "first_event", 5), ([sse(HERON[0])], "idle", 3)],
    ids=["first_event", "idle"],
)
async def test_bytes_that_are_no_event_are_no_progress(clock, packet, before, phase, seconds):
    timeout = md.Timeout(first_event=5, idle=3)
    stream = opened(Source(*before, *[1, packet] * 10), timeout=timeout)

    error, passed = await fails_at(stream, clock, md.APITimeoutError, clock.now)

    assert (error.phase, passed) == (phase, seconds)


async def test_of_two_limits_the_one_that_runs_out_first_is_named(clock):
    stream = opened(Source(sse(HERON[0])), timeout=md.Timeout(idle=4), total_at=clock.now + 9)

    error, seconds = await fails_at(stream, clock, md.StreamStalledError, clock.now)

    assert (error.phase, seconds) == ("idle", 4)


async def test_a_flood_of_comments_does_not_put_off_the_end(clock):
    class Flood(Source):
        async def __anext__(self):
            self.send(b":\n")
            clock.now += 0.01  # a little with every comment, so that nobody ever rests
            await asyncio.sleep(0)
            return await super().__anext__()

    stream = opened(Flood(sse(HERON[0])), timeout=md.Timeout(idle=1))

    error, _ = await fails_at(stream, clock, md.StreamStalledError, clock.now)

    assert (error.phase, error.partial) == ("idle", "A grey ")


async def test_every_event_is_progress(clock):
    script = []
    for body in [{"type": "mood"}, *HERON, DONE]:
        script += [2, b": ping\n\n", 0.5, sse(body)]
    stream = opened(Source(*script, END), timeout=md.Timeout(first_event=3, idle=3))

    assert await stream.text() == TEXT


async def test_a_slow_reader_never_runs_out_of_time():
    source = Source(*[sse(body) for body in HERON], 2, sse(DONE), END)
    stream = opened(source, timeout=md.Timeout(first_event=3, idle=3))
    await asyncio.sleep(1000)

    async for _ in stream:
        await asyncio.sleep(1000)

    assert stream.text_so_far == TEXT


async def test_a_stream_that_nobody_reads_has_no_timer_in_the_end():
    stream = opened(Source(sse(HERON[0])))
    await anext(stream)

    await asyncio.sleep(1000)

    assert [timer for timer in asyncio.get_running_loop()._scheduled if timer.when() > 0] == []
    await stream.aclose()


async def test_no_limit_is_for_ever(clock):
    source = Source(1e6, sse(HERON[0]), 1e6, sse(*HERON[1:], DONE), END)

    assert await opened(source, timeout=md.Timeout(first_event=None, idle=None)).text() == TEXT


async def test_a_stream_makes_few_timers(monkeypatch):
    """However many events: none is made for each."""
    loop = asyncio.get_running_loop()
    made = []
    call_at = loop.call_at
    monkeypatch.setattr(
        loop, "call_at", lambda *args, **kw: made.append(args) or call_at(*args, **kw)
    )
    source = Source()
    stream = opened(source)

    for _ in range(100):
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        source.send(sse(HERON[0]))
        await reader
    await stream.aclose()

    assert len(made) <= 2


async def test_what_came_while_the_process_was_frozen_is_in_time(clock):
    """The loop finds the time over and, in one of its next rounds, the bytes of meanwhile."""
    loop = asyncio.get_running_loop()
    source = Source(sse(HERON[0]))
    stream = opened(source, timeout=md.Timeout(idle=10))
    await anext(stream)
    reader = asyncio.create_task(stream.text())
    await asyncio.sleep(1)

    clock.now += 3600
    loop.call_soon(loop.call_soon, loop.call_soon, source.send, sse(*HERON[1:], DONE))

    assert await reader == TEXT
