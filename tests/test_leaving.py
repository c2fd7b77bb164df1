"""However a stream is left, its connection is closed at once, and it says so to who reads on.

Over bytes in memory; `test_cancel.py` has the same over sockets. Garbage is not collected
meanwhile: what is freed, is freed by reference counting.
"""

import asyncio
import contextlib
import copy
import inspect
import pickle
import re
import threading
import warnings
import weakref

import anyio
import pytest
from canned import IMAGE, client_of
from decoding import sse
from raw_server import RawServer, stall
from sources import (
    DONE,
    END,
    HERON,
    Source,
    closed_by_client,
    lost,
    no_cycles,
    opened,
    read_all,
    until_idle,
)

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.kinds import CaptionStream
from moondream_async._stream.opening import Opening
from moondream_async._stream.relay import HEARTBEAT

FIRST = HERON[0]["chunk"]
SHORT = 0.01  # seconds until somebody loses patience; nothing else happens meanwhile


@pytest.fixture(autouse=True)
def _no_garbage_collection():
    with no_cycles():
        yield


# -- a stream belongs to the task that reads it ------------------------------------------------


def by(name, of):
    """A reader that loops over what `of` makes of a stream."""

    async def read(stream, pause):
        async for piece in of(stream):
            if piece != HEARTBEAT:
                await pause()

    read.__name__ = name
    return read


async def passed_on(stream):
    """As web backends are written."""
    async for piece in stream:
        yield piece


async def by_held_chunk(stream, pause):
    pieces = stream["chunk"]
    async for _ in pieces:
        await pause()


async def by_hand(stream, pause):
    while True:
        await anext(stream)
        await pause()


async def by_text(stream, _pause):
    await stream.text()


by_loop = by("loop", lambda stream: stream)
by_generator = by("generator", passed_on)
LOOPS = [
    by_loop,
    by("chunk", lambda stream: stream.chunk),
    by_held_chunk,
    by("events", lambda stream: stream.events),
]
READERS = [
    *LOOPS,
    by_generator,
    by_hand,
    by("sse", lambda stream: stream.sse(heartbeat=None)),
    by("sse with heartbeats", lambda stream: stream.sse()),
    by("bytes", lambda stream: stream.chunk_bytes()),
]


async def task(reading):
    reader = asyncio.ensure_future(reading)
    await until_idle()
    reader.cancel()
    await asyncio.wait([reader])
    return reader  # with its exception, whose traceback keeps the frames that read


async def cancel_scope(reading):
    with anyio.CancelScope() as scope:
        asyncio.get_running_loop().call_later(SHORT, scope.cancel)
        await reading


async def move_on_after(reading):
    with anyio.move_on_after(SHORT):
        await reading


async def timeout(reading):
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(SHORT):
            await reading
    return caught


async def wait_for(reading):
    with pytest.raises(TimeoutError) as caught:
        await asyncio.wait_for(reading, SHORT)
    return caught


async def task_group(reading):
    async def fail():
        await until_idle()
        raise ZeroDivisionError

    async def read():
        async with anyio.create_task_group() as group:
            group.start_soon(fail)
            await reading

    with pytest.raises(ExceptionGroup) as caught:
        await read()
    return caught


async def child_of_a_task_group(reading):
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: reading)
        await until_idle()
        group.cancel_scope.cancel()


CANCELLING = [
    task,
    child_of_a_task_group,
    cancel_scope,
    move_on_after,
    timeout,
    wait_for,
    task_group,
]


def named(function):
    return function.__name__


async def assert_closed_for_cancelled(stream, source):
    assert (source.closed, source.finished) == (True, False)
    assert stream.text_so_far == FIRST
    for reader in (stream, stream.chunk, stream.events, stream.chunk_bytes()):
        with pytest.raises(md.ClientClosedError, match=r"cancelled.* Timeout\(idle=.*asyncio.wait"):
            await anext(reader)
    with pytest.raises(md.ClientClosedError, match="cancelled"):
        await stream.text()
    await stream.aclose()


async def no_pause():
    pass


async def wait_for_ever():
    await asyncio.Event().wait()


in_both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [("asyncio", {"use_uvloop": uvloop}) for uvloop in (False, True)],
    ids=["asyncio", "uvloop"],
)


@pytest.mark.parametrize(
    ("read", "cancel"),
    [(read, task) for read in [*READERS, by_text]]
    + [(read, cancel) for read in (by_loop, by_generator) for cancel in CANCELLING[1:]],
    ids=named,
)
@in_both_loops
async def test_a_stream_is_closed_when_its_reader_is_cancelled_in_a_read(read, cancel):
    source = Source(sse(HERON[0]))
    stream = opened(source)

    kept = await cancel(read(stream, no_pause))

    await until_idle()
    await assert_closed_for_cancelled(stream, source)
    del kept


@pytest.mark.parametrize(
    ("read", "cancel"),
    [(read, task) for read in READERS]
    # A task that goes on after it was cancelled is seen to leave a loop.
    + [(read, timeout) for read in LOOPS]
    + [(by_loop, cancel) for cancel in CANCELLING if cancel not in (task, timeout)],
    ids=named,
)
@in_both_loops
async def test_a_stream_is_closed_when_its_reader_is_cancelled_between_two_reads(read, cancel):
    source = Source(sse(HERON[0]))
    stream = opened(source)

    kept = await cancel(read(stream, wait_for_ever))

    await until_idle()
    await assert_closed_for_cancelled(stream, source)
    del kept


async def test_a_reader_cancelled_between_two_events_of_a_packet_closes_the_stream():
    source = Source(sse(*HERON))
    stream = opened(source)
    assert await anext(stream) == FIRST

    await task(by_loop(stream, wait_for_ever))

    assert source.closed
    with pytest.raises(md.ClientClosedError, match="cancelled"):
        await anext(stream)


async def test_the_owner_is_the_task_that_read_last():
    source = Source(sse(HERON[0]))
    stream = opened(source)
    go_on = asyncio.Event()

    async def read_one():
        await anext(stream)
        await go_on.wait()

    first = asyncio.create_task(read_one())
    await until_idle()
    source.send(sse(HERON[1]))
    assert await anext(stream) == "heron "
    first.cancel()
    await asyncio.wait([first])
    await until_idle()

    assert not source.closed
    source.send(sse(HERON[2], DONE))
    assert await stream.text() == "A grey heron stands."


async def test_the_task_that_opened_a_stream_does_not_own_it():
    async def open_it():
        streams.append(opened(source))
        await wait_for_ever()

    streams, source = [], Source(sse(*HERON, DONE))
    await task(open_it())

    assert await streams[0].text() == "A grey heron stands."


@pytest.mark.parametrize("ends", [lambda: None, lambda: 1 / 0], ids=["well", "by an error"])
async def test_a_reader_that_ends_leaves_the_stream_to_the_next(ends):
    async def read_one():
        assert await anext(stream) == FIRST
        ends()

    source = Source(sse(HERON[0]))
    stream = opened(source)
    await asyncio.wait([reader := asyncio.create_task(read_one())])
    assert isinstance(reader.exception(), ZeroDivisionError | None)

    assert not source.closed
    source.send(sse(*HERON[1:], DONE))
    assert await stream.text() == "A grey heron stands."


async def test_a_second_reader_that_is_refused_and_cancelled_closes_nothing():
    source = Source()
    stream = opened(source)
    first = asyncio.create_task(stream.text())
    await until_idle()

    async def disturb():
        with pytest.raises(md.MoondreamError, match="Another task is already reading"):
            await anext(stream)
        await wait_for_ever()

    await task(disturb())

    source.send(sse(*HERON, DONE))
    assert await first == "A grey heron stands."


async def test_waiting_with_a_limit_without_cancelling_loses_nothing():
    """What the error that a cancelled reader meets speaks of."""
    source = Source()
    stream = opened(source)
    reader = asyncio.create_task(stream.text())

    done, _ = await asyncio.wait([reader], timeout=SHORT)

    assert not done
    source.send(sse(*HERON, DONE))
    assert await reader == "A grey heron stands."


@pytest.mark.parametrize("read", READERS, ids=named)
async def test_a_task_that_reads_many_streams_is_not_reminded_of_each(read):
    me = asyncio.current_task()
    before = [*(me._callbacks or ())]
    for _ in range(3):
        with contextlib.suppress(StopAsyncIteration):
            await read(opened(Source(sse(*HERON, DONE))), no_pause)

    assert [*(me._callbacks or ())] == before


def test_an_answer_that_is_there_is_read_without_a_task_and_without_a_loop():
    decoder = decoder_for("caption")
    events = decoder.body(b'{"caption": "A heron."}')
    reading = CaptionStream(Opening(decoder, events=events)).text()

    with pytest.raises(StopIteration) as caught:
        reading.send(None)

    assert caught.value.value == "A heron."


# -- it is one connection, which can't be two ---------------------------------------------------

ONLY_ONCE = {
    "the stream": lambda stream: stream,
    "chunk": lambda stream: stream.chunk,
    "events": lambda stream: stream.events,
    "sse": lambda stream: stream.sse(),
    "chunk_bytes": lambda stream: stream.chunk_bytes(),
}


@pytest.mark.parametrize("of", ONLY_ONCE.values(), ids=ONLY_ONCE)
async def test_a_stream_can_not_be_copied(of):
    source = Source(sse(*HERON, DONE))
    stream = opened(source)
    original = of(stream)

    for double in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied"):
            double(original)

    assert not source.closed
    assert await stream.text() == "A grey heron stands."


# -- dropped -------------------------------------------------------------------------------


async def unread(source):
    return opened(source, opened_at="app.py:7")


async def half_read(source):
    stream = opened(source, opened_at="app.py:7")
    await anext(stream)
    return stream


async def after_events(source):
    stream = opened(source, opened_at="app.py:7")
    await anext(stream.events)
    return stream


async def after_a_break(source):
    stream = opened(source, opened_at="app.py:7")
    async for _ in stream:
        break
    return stream


UNFINISHED = [unread, half_read, after_events, after_a_break]


@pytest.mark.parametrize("make", UNFINISHED, ids=named)
async def test_a_dropped_stream_is_freed_at_once_and_warns(make):
    source = Source(sse(HERON[0]))
    with warnings.catch_warnings():
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


async def read_to_the_end(source):
    source.send(sse(*HERON, DONE), END)
    stream = opened(source)
    await stream.text()
    return stream


async def closed(source):
    source.send(sse(HERON[0]))
    stream = await half_read(source)
    await stream.aclose()
    with pytest.raises(md.ClientClosedError):
        await stream.text()
    return stream


async def closed_under_a_reader(source):
    stream = opened(source)
    reader = asyncio.create_task(stream.text())
    await until_idle()
    await stream.aclose()
    await asyncio.wait([reader])  # raised here, its frames would keep what they read
    assert "closed while it was read" in str(reader.exception())
    return stream


async def cancelled(source):
    stream = opened(source)
    await task(stream.text())
    return stream


async def complete_and_not_read_to_the_end(source):
    source.send(sse(*HERON, DONE), END)
    stream = opened(source)
    await anext(stream)
    return stream


def failed(*script, **options):
    async def make(source):
        source.send(sse(HERON[0]), *script)
        stream = opened(source, **options)
        for _ in range(2):
            with pytest.raises(md.MoondreamError):
                await stream.text()
        return stream

    return make


def tried_again(*script, refusal=None):
    async def make(source):
        async def reopen(error):
            raise error if refusal is None else refusal("no", status=400)

        source.send(*script)
        stream = opened(source, reopen=reopen)
        for _ in range(2):
            with pytest.raises(md.MoondreamError):
                await stream.text()
        return stream

    return make


FINISHED = {
    "read to the end": read_to_the_end,
    "closed": closed,
    "closed under a reader": closed_under_a_reader,
    "cancelled": cancelled,
    "complete, not read to the end": complete_and_not_read_to_the_end,
    "ended early": failed(END),
    "connection lost": failed(lost),
    "client closed": failed(closed_by_client),
    "error event": failed(sse({"error": "boom"})),
    "no JSON": failed(b"data: odd\n\n"),
    "idle": failed(timeout=md.Timeout(idle=SHORT)),
    "out of time": failed(total_at=0.0, timeout=md.Timeout(total=SHORT)),
    "tried again in vain": tried_again(END),
    "tried again after a lost connection": tried_again(lost),
    "tried again and refused": tried_again(END, refusal=md.BadRequestError),
}


@pytest.mark.parametrize("make", FINISHED.values(), ids=FINISHED)
async def test_a_stream_that_is_over_is_freed_at_once_without_a_word(make):
    source = Source()
    stream = await make(source)
    freed = weakref.ref(stream)
    del stream

    assert freed() is None
    assert source.closed


@pytest.mark.parametrize("ask", ["caption", "query", "segment"])
async def test_the_warning_names_the_line_that_opened_the_stream(ask):
    more = () if ask == "caption" else ("What?",)
    async with RawServer(stall) as server, client_of(server) as client:
        stream = await getattr(client, ask)(IMAGE, *more, stream=True)
        here = inspect.currentframe().f_lineno - 1

        with pytest.warns(ResourceWarning, match=f"opened at {re.escape(__file__)}:{here}: "):
            del stream


# -- closed --------------------------------------------------------------------------------


async def leave_by_end(stream):
    async with stream:
        pass


async def leave_by_break(stream):
    async with stream:
        async for _ in stream:
            break


async def leave_by_error(stream):
    with pytest.raises(ZeroDivisionError):
        async with stream:
            raise ZeroDivisionError


async def leave_by_cancelling(stream):
    with anyio.CancelScope() as scope:
        async with stream:
            scope.cancel()
            await anyio.sleep_forever()


async def close_it(stream):
    await stream.aclose()
    await stream.aclose()


async def close_what_it_is_passed_on_by(stream):
    await stream.chunk.aclose()


async def close_in_another_thread(stream):
    thread = threading.Thread(target=stream.chunk.close)
    thread.start()
    thread.join()


CLOSING = [
    leave_by_end,
    leave_by_break,
    leave_by_error,
    leave_by_cancelling,
    close_it,
    close_what_it_is_passed_on_by,
    close_in_another_thread,
]


@pytest.mark.parametrize("close", CLOSING, ids=named)
@pytest.mark.parametrize("packets", [[sse(*HERON)], [sse(*HERON, DONE)]], ids=["open", "complete"])
async def test_a_closed_stream_does_not_pass_for_one_that_was_read(close, packets):
    source = Source(*packets)
    stream = opened(source)
    await anext(stream)

    await close(stream)

    assert source.closed
    for reader in (stream, stream.chunk, stream.events):
        with pytest.raises(md.ClientClosedError, match="closed before its end"):
            await anext(reader)
    with pytest.raises(md.ClientClosedError):
        await stream.text()
    assert stream.text_so_far in (FIRST, "A grey heron ")


async def test_a_stream_closed_after_its_last_piece_is_at_its_end():
    stream = opened(Source(sse(*HERON, DONE)))
    for _ in HERON:
        await anext(stream)

    await stream.aclose()

    assert await read_all(stream) == []


async def test_closing_a_complete_stream_can_be_cancelled_and_closes_all_the_same():
    class Slow(Source):
        async def finish(self):
            await anyio.sleep_forever()

    source = Slow(sse(*HERON, DONE))
    stream = opened(source)
    await anext(stream)
    with anyio.move_on_after(SHORT):
        await stream.aclose()

    assert source.closed
