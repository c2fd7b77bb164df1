"""Streams passed on as Server-Sent Events, from bytes in memory."""

import asyncio
import json
import math
import threading
import weakref
from typing import NamedTuple

import pytest
from decoding import chat, sse
from hypothesis import given
from hypothesis import strategies as st
from sources import (
    DONE,
    END,
    HERON,
    TEXT,
    Source,
    closed_by_client,
    lost,
    no_cycles,
    opened,
    read_all,
    until_idle,
)

import moondream_async as md
from moondream_async._protocol.chunks import Block
from moondream_async._protocol.decoders import decoder_for
from moondream_async._protocol.secret import Redactor, Secret
from moondream_async._protocol.sse import SSEParser
from moondream_async._stream.kinds import CaptionStream, ChatStream, QueryStream, SegmentStream
from moondream_async._stream.opening import Opening
from moondream_async._stream.relay import HEARTBEAT

pytestmark = pytest.mark.own_time

KEY = "key-0123456789"
FINAL = md.FinalEvent(raw={})
NOTHING = {"finish_reason": None, "metrics": None, "usage": None, "reasoning": None}


def parse(*writes):
    """What a browser makes of the bytes: names and data."""
    return [(event.event, json.loads(event.data)) for event in SSEParser().feed(b"".join(writes))]


async def events_of(stream, **options):
    return parse(*await read_all(stream.sse(**options)))


def text(events):
    return "".join(data["chunk"] for name, data in events if name == "chunk")


# -- what is said ------------------------------------------------------------------------


class Answer(NamedTuple):
    stream: type
    skill: str
    sent: list
    expected: list


REASONING = {"text": "Two legs.", "grounding": []}
BBOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
ANSWERS = {
    "caption": Answer(
        CaptionStream,
        "caption",
        [*HERON, DONE],
        [
            *[("chunk", each) for each in HERON],
            ("done", NOTHING | {key: value for key, value in DONE.items() if key != "completed"}),
        ],
    ),
    "query with reasoning": Answer(
        QueryStream,
        "query",
        [{"chunk": "A"}, {"chunk": "B", "completed": True, "reasoning": REASONING}],
        [
            ("chunk", {"chunk": "A"}),
            ("chunk", {"chunk": "B"}),
            ("done", NOTHING | {"request_id": None, "reasoning": REASONING}),
        ],
    ),
    "chat": Answer(
        ChatStream,
        "chat",
        [chat(reasoning="Hm."), chat(content="Yes"), {"choices": [], "usage": USAGE}, b"[DONE]"],
        [
            ("reasoning", {"text": "Hm."}),
            ("chunk", {"chunk": "Yes"}),
            (
                "done",
                NOTHING
                | {
                    "request_id": None,
                    "usage": USAGE,
                    "reasoning": {"text": "Hm.", "grounding": []},
                },
            ),
        ],
    ),
    "outline": Answer(
        SegmentStream,
        "segment",
        [
            {"type": "bbox", "bbox": BBOX},
            {"type": "path_delta", "chunk": "M 0"},
            {"type": "final", "chunk": "", "completed": True, "path": "M 0 0 Z", "bbox": BBOX},
        ],
        [
            ("bbox", {"bbox": BBOX}),
            ("chunk", {"chunk": "M 0"}),
            (
                "done",
                NOTHING
                | {"request_id": None, "bbox": BBOX, "path": "M 0 0 Z", "parse_error": None},
            ),
        ],
    ),
}


PLAIN_TEXT = {
    "Content-Type": "text/plain; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
EVENTS = PLAIN_TEXT | {"Content-Type": "text/event-stream"}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_arrives_as_events_or_as_plain_text_in_bytes(answer):
    for sent in ([sse(*answer.sent)], [sse(each) for each in answer.sent]):
        stream = opened(Source(*sent, END), answer.stream, answer.skill)
        assert await events_of(stream) == answer.expected
        assert stream.completed

        as_bytes = opened(Source(*sent, END), answer.stream, answer.skill).chunk_bytes()
        assert b"".join(await read_all(as_bytes)).decode() == text(answer.expected)
        assert as_bytes.headers == PLAIN_TEXT
        assert stream.sse().headers == EVENTS


async def test_what_has_arrived_goes_in_one_write_and_done_with_the_last_of_it():
    source = Source(sse(*HERON[:2]), sse(HERON[2], DONE))

    opening, first, last = await read_all(opened(source).sse())

    assert opening == HEARTBEAT
    assert text(parse(first)) == "A grey heron "
    assert [name for name, _ in parse(last)] == ["chunk", "done"]
    assert source.finished


@given(st.lists(st.text(st.characters(exclude_categories=())), max_size=5))
def test_any_text_arrives_as_it_is(pieces):
    """With line breaks of every kind, zeros and halves of characters."""

    block = Block.of([md.ChunkEvent(chunk=piece, raw={}) for piece in pieces] + [FINAL])
    stream = CaptionStream(Opening(decoder_for("caption"), events=block))
    with pytest.raises(StopIteration) as caught:  # no wait is left, and so no loop is needed
        anext(stream.sse(heartbeat=None)).send(None)

    said = [data["chunk"] for name, data in parse(caught.value.value) if name == "chunk"]

    assert said == [*filter(None, pieces)]


async def test_it_reads_on_from_where_the_text_was_read_to():
    stream = opened(Source(sse(*HERON, DONE), END))
    await anext(stream)

    events = await events_of(stream)

    assert text(events) == "heron stands."
    assert events[-1][0] == "done"
    assert stream.text_so_far == TEXT
    assert (await events_of(stream)) == events[-1:]


async def test_heartbeats_that_can_not_be_are_refused_and_the_stream_stays_whole():
    stream = opened(Source(sse(*HERON, DONE), END))

    for heartbeat in (0, -1, 0.0, math.nan, math.inf, True, "15"):
        with pytest.raises(md.RequestError, match="heartbeat must be a number"):
            stream.sse(heartbeat=heartbeat)

    assert await stream.text() == TEXT


# -- what goes wrong ---------------------------------------------------------------------


async def refuse(error):
    raise md.ServerError("No.", status=503)


def waits(**options):
    return {"timeout": md.Timeout(**options)}


FAILURES = {
    "ended early": ([END], {}, {"type": "StreamInterruptedError"}),
    "connection lost": ([lost], {}, {"type": "StreamInterruptedError"}),
    "client closed": ([closed_by_client], {}, {"type": "ClientClosedError"}),
    "error event": ([sse({"error": "boom"})], {}, {"type": "StreamServerError", "message": "boom"}),
    "nonsense": ([b"data: [1]\n\n"], {}, {"type": "StreamProtocolError"}),
    "idle": ([], waits(idle=5), {"type": "StreamStalledError", "phase": "idle"}),
}


@pytest.mark.parametrize(("script", "options", "said"), FAILURES.values(), ids=FAILURES)
async def test_a_failure_is_the_last_event_and_no_exception(script, options, said):
    for pause in ([], [1.0]):
        source = Source(sse(HERON[0]), *pause, *script)

        *before, (name, data) = await events_of(opened(source, **options))

        assert before == [("chunk", HERON[0])]
        assert name == "error"
        assert data.keys() == {"error"}
        assert data["error"].items() >= said.items()
        assert data["error"]["message"]
        assert data["error"].keys() - {"message"} == said.keys() - {"message"}
        assert source.closed


async def test_a_refused_try_says_its_status():
    stream = opened(Source(END), reopen=refuse)

    assert await events_of(stream) == [
        ("error", {"error": {"type": "ServerError", "message": "No.", "status": 503}})
    ]


async def test_no_error_holds_the_key():
    opening = Opening(
        decoder_for("caption", secret=Redactor(Secret(KEY))),
        Source(sse({"error": f"{KEY} is no good"})),
    )

    writes = await read_all(CaptionStream(opening).sse())

    assert KEY.encode() not in b"".join(writes)
    assert b"*** is no good" in b"".join(writes)


async def test_a_stream_that_was_closed_says_so():
    stream = opened(Source(sse(*HERON)))
    await stream.aclose()

    [(name, data)] = await events_of(stream)

    assert (name, data["error"]["type"]) == ("error", "ClientClosedError")


# -- heartbeats --------------------------------------------------------------------------


async def timed(events, clock):
    """Read to the end; return each write with the second at which it came."""
    began = clock.now
    return [(round(clock.now - began, 3), write) async for write in events]


async def test_a_comment_comes_for_each_heartbeat_of_silence(clock):
    source = Source(40.0, sse(HERON[0]), 15.5, sse(HERON[1]), 14.5, sse(HERON[2], DONE))

    writes = await timed(opened(source).sse(), clock)

    assert [seconds for seconds, _ in writes] == [0, 15, 30, 40, 55, 55.5, 70]
    silent = [seconds for seconds, write in writes if write == HEARTBEAT]
    assert silent == [0, 15, 30, 55]
    assert source.asked == 3  # no read was interrupted
    assert text(parse(*[write for _, write in writes])) == TEXT


async def test_without_heartbeats_there_is_no_comment_and_no_task(clock):
    def look():
        seen.append(asyncio.all_tasks())
        source.send(sse(*HERON[1:], DONE))

    seen = []
    source = Source(sse(HERON[0]))
    asyncio.get_running_loop().call_later(40, look)

    writes = await timed(opened(source).sse(heartbeat=None), clock)

    assert [seconds for seconds, _ in writes] == [0, 40]
    assert seen == [asyncio.all_tasks()]


async def test_heartbeats_are_no_progress_to_the_limits(clock):
    stream = opened(Source(sse(HERON[0])), **waits(idle=100))

    writes = await timed(stream.sse(), clock)

    assert [seconds for seconds, _ in writes] == [0, 0, 15, 30, 45, 60, 75, 90, 100]
    assert parse(writes[-1][1])[0][1]["error"]["phase"] == "idle"


async def test_heartbeats_interrupt_no_other_try(clock):
    async def reopen(error):
        tries.append(error)
        await asyncio.sleep(40)
        return Opening(decoder_for("caption"), Source(sse(*HERON, DONE)))

    tries = []
    stream = opened(Source(END), reopen=reopen)

    writes = await timed(stream.sse(), clock)

    assert [seconds for seconds, _ in writes] == [0, 15, 30, 40]
    assert len(tries) == 1


async def test_a_slow_browser_is_read_ahead_of_by_one_block():
    source = Source(20.0, *[sse({"chunk": f"{number} "}) for number in range(9)], sse(DONE))
    events = opened(source).sse()
    assert [await anext(events), await anext(events)] == [HEARTBEAT, HEARTBEAT]

    await asyncio.sleep(100)

    assert source.asked == 1
    assert text(parse(*await read_all(events))) == "0 1 2 3 4 5 6 7 8 "


async def test_there_is_a_task_only_while_the_server_is_waited_for():
    source = Source(sse(HERON[0]))
    events = opened(source).sse()
    before = asyncio.all_tasks()

    assert await anext(events) == HEARTBEAT
    assert parse(await anext(events)) == [("chunk", HERON[0])]
    assert asyncio.all_tasks() == before
    assert await anext(events) == HEARTBEAT
    assert len(asyncio.all_tasks() - before) == 1
    source.send(sse(HERON[1]))
    await anext(events)
    assert asyncio.all_tasks() == before
    await events.aclose()


# -- the end -----------------------------------------------------------------------------


async def after_a_heartbeat(events):
    assert [await anext(events), await anext(events)] == [HEARTBEAT, HEARTBEAT]


async def closed(held):
    await held[0].aclose()
    await held[0].aclose()


async def closed_in_another_thread(held):
    thread = threading.Thread(target=held[0].close)
    thread.start()
    thread.join()


async def cancelled(held):
    reader = asyncio.create_task(read_all(held[0]))
    await until_idle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader


async def dropped(held):
    """Web frameworks drop what a browser no longer wants, so there is nothing to warn of."""
    freed = weakref.ref(held[0]._stream)
    held.clear()
    await until_idle()
    assert freed() is None


@pytest.mark.parametrize("leave", [closed, closed_in_another_thread, cancelled, dropped])
async def test_leaving_it_after_a_heartbeat_ends_the_task_that_reads(leave):
    """`test_leaving.py` leaves it in all other places."""
    source, before = Source(), asyncio.all_tasks()
    with no_cycles():
        held = [opened(source).sse()]
        await after_a_heartbeat(held[0])

        await leave(held)

        assert source.closed
        await until_idle()
        assert asyncio.all_tasks() == before
        for events in held:
            with pytest.raises(StopAsyncIteration):
                await anext(events)


async def test_a_second_reader_is_refused_and_disturbs_nothing():
    source = Source()
    events = opened(source).sse()
    reader = asyncio.create_task(read_all(events))
    await until_idle()

    with pytest.raises(md.MoondreamError, match="Another task"):
        await anext(events)

    source.send(sse(*HERON, DONE))
    assert text(parse(*await reader)) == TEXT
