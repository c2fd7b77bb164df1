"""A stream that is dropped is freed at once, by reference counting, and frees its connection."""

import asyncio
import contextlib
import inspect
import re
import warnings
import weakref

import pytest
from decoding import sse
from own_clock import OwnClock
from raw_server import STREAM_HEAD, RawServer
from sources import (
    DONE,
    END,
    HERON,
    Source,
    closed_by_client,
    lost,
    no_cycles,
    opened,
    until_idle,
)

import moondream_async as md


@pytest.fixture
def clock(monkeypatch):
    return OwnClock(monkeypatch)


@pytest.fixture
def anyio_backend(clock):
    return "asyncio", {"loop_factory": clock.new_loop}


async def drop_unread(source):
    return opened(source, opened_at="app.py:7")


async def drop_half_read(source):
    stream = opened(source, opened_at="app.py:7")
    await anext(stream)
    return stream


async def drop_after_events(source):
    stream = opened(source, opened_at="app.py:7")
    await anext(stream.events)
    return stream


async def interrupt(stream, meanwhile):
    """Let a task wait for text, do something, and cancel it."""
    reader = asyncio.create_task(stream.text())
    await until_idle()
    with contextlib.suppress(md.MoondreamError):
        await meanwhile()
    reader.cancel()
    await asyncio.wait([reader])  # not raised here: an event loop is in no hurry to drop it
    if not reader.cancelled():
        assert isinstance(reader.exception(), md.ClientClosedError)


async def drop_after_cancelling(source):
    stream = await drop_half_read(source)
    await interrupt(stream, until_idle)
    return stream


async def drop_after_refusing(source):
    stream = await drop_half_read(source)
    await interrupt(stream, stream.text)
    return stream


UNFINISHED = [
    drop_unread,
    drop_half_read,
    drop_after_events,
    drop_after_cancelling,
    drop_after_refusing,
]


@pytest.mark.parametrize("make", UNFINISHED)
async def test_a_dropped_stream_is_freed_at_once_and_warns(make):
    source = Source(sse(HERON[0]))
    with no_cycles(), warnings.catch_warnings():
        # Where warnings are recorded, they keep the stream.
        warnings.simplefilter("ignore")
        stream = await make(source)
        freed = weakref.ref(stream)
        assert not source.closed
        del stream

        assert freed() is None
        assert (source.closed, source.finished) == (True, False)

    stream = await make(Source(sse(HERON[0])))
    with pytest.warns(ResourceWarning) as caught:
        del stream
    [warning] = caught
    assert str(warning.message).startswith(
        "CaptionStream was dropped before its end, opened at app.py:7: its connection is closed."
    )


async def after_end(source):
    source.send(sse(*HERON, DONE), END)
    stream = opened(source)
    await stream.text()
    return stream


async def after_closing(source):
    source.send(sse(HERON[0]))
    stream = await drop_half_read(source)
    await stream.aclose()
    with contextlib.suppress(md.ClientClosedError):
        await stream.text()
    return stream


async def after_completion(source):
    """All has arrived, and not all was read."""
    source.send(sse(*HERON, DONE), END)
    stream = opened(source)
    await anext(stream)
    await anext(stream)
    return stream


def after_failure(*script, **options):
    async def make(source):
        source.send(sse(HERON[0]), *script)
        stream = opened(source, **options)
        for _ in range(2):
            with contextlib.suppress(md.MoondreamError):
                await stream.text()
        return stream

    return make


def after_trying_again(*script, refusal=None):
    async def make(source):
        tries = []

        async def reopen(error):
            tries.append(True)
            raise error if refusal is None else refusal("no", status=400)

        source.send(*script)
        stream = opened(source, reopen=reopen)
        for _ in range(2):
            with contextlib.suppress(md.MoondreamError):
                await stream.text()
        assert tries == [True]
        return stream

    return make


async def after_closing_under_a_reader(source):
    stream = opened(source)
    await interrupt(stream, stream.aclose)
    return stream


FINISHED = {
    "read to the end": after_end,
    "closed": after_closing,
    "closed under a reader": after_closing_under_a_reader,
    "complete, not read to the end": after_completion,
    "ended early": after_failure(END),
    "connection lost": after_failure(lost),
    "client closed": after_failure(closed_by_client),
    "error event": after_failure(sse({"error": "boom"})),
    "no JSON": after_failure(b"data: odd\n\n"),
    "idle": after_failure(500),
    "out of time": after_failure(500, total_at=1010.0, timeout=md.Timeout(total=10)),
    "tried again in vain": after_trying_again(END),
    "tried again after a lost connection": after_trying_again(lost),
    "tried again and refused": after_trying_again(END, refusal=md.BadRequestError),
}


@pytest.mark.parametrize("make", FINISHED.values(), ids=FINISHED)
@pytest.mark.slow
async def test_a_stream_that_is_over_is_freed_at_once_without_a_word(make):
    source = Source()
    with no_cycles():
        stream = await make(source)
        freed = weakref.ref(stream)
        del stream

        assert freed() is None
        assert source.closed


async def test_a_dropped_stream_leaves_no_timer():
    loop = asyncio.get_running_loop()
    stream = await drop_after_cancelling(Source(sse(HERON[0])))
    with pytest.warns(ResourceWarning):
        del stream

    assert [timer for timer in loop._scheduled if not timer.cancelled()] == []


async def never_ends(peer):
    await peer.request()
    await peer.send(STREAM_HEAD)
    await peer.until_gone()


@pytest.mark.parametrize("ask", ["caption", "query", "segment"])
async def test_the_warning_names_the_line_that_opened_the_stream(ask):
    image = md.EncodedImage(b"a picture, to a server that does not look", "image/png", 1, 1)
    more = () if ask == "caption" else ("What?",)
    async with (
        RawServer(never_ends) as server,
        md.MoondreamClient(endpoint=server.endpoint) as client,
    ):
        stream = await getattr(client, ask)(image, *more, stream=True)
        here = inspect.currentframe().f_lineno - 1

        with pytest.warns(ResourceWarning, match=f"opened at {re.escape(__file__)}:{here}: "):
            del stream
