"""Whose a stream is: the task's that read it last; `test_leaving.py` cancels that in every way."""

import asyncio

import pytest
from decoding import sse
from scenes import KINDS
from sources import DONE, HERON, TEXT, Source, opened, read_all, until_idle

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.kinds import CaptionStream
from moondream_async._stream.opening import Opening


async def test_the_owner_is_the_task_that_read_last():
    source = Source(sse(HERON[0]))
    stream = opened(source)

    async def read_one():
        await anext(stream)
        await asyncio.Event().wait()

    first = asyncio.create_task(read_one())
    await until_idle()
    source.send(sse(HERON[1]))
    assert await anext(stream) == "heron "
    first.cancel()
    await asyncio.wait([first])
    await until_idle()

    assert not source.closed
    source.send(sse(HERON[2], DONE))
    assert await stream.text() == TEXT


async def read_one(stream):
    await anext(stream)


async def read_one_and_fail(stream):
    await anext(stream)
    raise ZeroDivisionError


async def be_refused_and_cancelled(stream):
    """Since another task is reading."""
    with pytest.raises(md.MoondreamError, match="Another task is already reading"):
        await anext(stream)
    asyncio.current_task().cancel()
    await asyncio.Event().wait()


async def open_it_and_be_cancelled(stream):
    asyncio.current_task().cancel()
    await asyncio.Event().wait()


HARMLESS = [read_one, read_one_and_fail, open_it_and_be_cancelled, be_refused_and_cancelled]


@pytest.mark.parametrize("touch", HARMLESS, ids=lambda each: each.__name__)
async def test_a_task_that_ends_leaves_the_stream_to_who_reads_on(touch):
    streams, source = [], Source(sse(HERON[0]))

    async def other():
        streams.append(opened(source))
        if touch is be_refused_and_cancelled:
            streams.append(asyncio.create_task(streams[0].text()))
            await until_idle()
        await touch(streams[0])

    await asyncio.wait([reader := asyncio.create_task(other())])
    await until_idle()

    assert reader.cancelled() or isinstance(reader.exception(), ZeroDivisionError | None)
    assert not source.closed
    source.send(sse(*HERON[1:], DONE))
    reading = streams[1] if streams[1:] else streams[0].text()
    assert await reading == TEXT


async def test_waiting_with_a_limit_without_cancelling_loses_nothing():
    """What the error that a cancelled reader meets speaks of."""
    source = Source()
    reader = asyncio.create_task(opened(source).text())

    done, _ = await asyncio.wait([reader], timeout=0.01)

    assert not done
    source.send(sse(*HERON, DONE))
    assert await reader == TEXT


async def test_a_task_that_reads_many_streams_is_not_reminded_of_each():
    me = asyncio.current_task()
    before = [*(me._callbacks or ())]
    for kind in KINDS.values():
        await read_all(kind.hold(opened(Source(sse(*HERON, DONE)))))

        assert [*(me._callbacks or ())] == before


def test_an_answer_that_is_there_is_read_without_a_task_and_without_a_loop():
    decoder = decoder_for("caption")
    events = decoder.body(b'{"caption": "A heron."}')
    reading = CaptionStream(Opening(decoder, events=events)).text()

    with pytest.raises(StopIteration) as caught:
        reading.send(None)

    assert caught.value.value == "A heron."
