"""Streams over bytes in memory: what readers get, and what becomes of the source.

No sockets: a `Source` is told what arrives, and when. Time is the tests' own.
"""

import asyncio
import copy
import pickle
from collections.abc import Iterable

import anyio
import pytest
from decoding import STOP, chat, sse
from scenes import KINDS
from sources import (
    DONE,
    END,
    HERON,
    TEXT,
    Source,
    answered,
    lost,
    opened,
    read_all,
    until_idle,
)

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.call import StreamCall
from moondream_async._stream.kinds import CaptionStream, ChatStream, QueryStream, SegmentStream
from moondream_async._stream.opening import Opening

pytestmark = pytest.mark.own_time


# -- reading -------------------------------------------------------------------------------


async def test_pieces_come_as_they_arrive_and_nothing_is_asked_for_before():
    source = Source()
    stream = opened(source)
    await until_idle()
    assert source.asked == 0

    for number, body in enumerate(HERON, start=1):
        source.send(sse(body))
        assert await anext(stream) == body["chunk"]
        assert source.asked == number
    await stream.aclose()


READERS = {
    "the stream": lambda stream: stream,
    "chunk": lambda stream: stream.chunk,
    "['chunk']": lambda stream: stream["chunk"],
    "the official SDK's key": lambda stream: stream[KEYS[type(stream)]],
}
KEYS = {CaptionStream: "caption", QueryStream: "answer", ChatStream: "message"}
MESSAGES = [*[chat(content=each["chunk"]) for each in HERON], STOP, b"[DONE]"]


@pytest.mark.parametrize(
    ("kind", "skill", "bodies"),
    [
        (CaptionStream, "caption", [*HERON, DONE]),
        (QueryStream, "query", [*HERON, DONE]),
        (ChatStream, "chat", MESSAGES),
    ],
)
async def test_all_names_are_one_iterator(kind, skill, bodies):
    for reader in READERS.values():
        stream = opened(Source(sse(*bodies), END), kind, skill)
        first = reader(stream)

        assert await anext(first) == "A grey "
        assert await anext(reader(stream)) == "heron "
        assert await anext(stream.chunk) == "stands."
        assert await read_all(first) == []


async def test_there_are_no_other_keys():
    async with answered(DONE) as stream:
        for key in ("answer", "path", "text", "_clock", "", "events"):
            with pytest.raises(KeyError) as caught:
                stream[key]
            assert caught.value.args == (key,)


async def test_a_stream_is_no_sequence_though_it_has_keys():
    """Or else `list` and Django, which ask for items first, would read it as one."""
    async with answered(DONE) as stream:
        with pytest.raises(TypeError, match="not iterable"):
            iter(stream)
        assert not isinstance(stream, Iterable)


async def test_empty_pieces_are_not_handed_out():
    stream = answered({"chunk": ""}, HERON[0], {"chunk": None}, {"chunk": "", "completed": True})

    assert await read_all(stream) == ["A grey "]


async def test_text_and_events_can_be_read_by_turns():
    stream = opened(Source(sse(*HERON[:2]), sse(HERON[2], DONE), END))

    assert await anext(stream) == "A grey "
    assert (await anext(stream.events)).chunk == "heron "
    assert stream.text_so_far == "A grey heron "
    assert await anext(stream) == "stands."
    assert isinstance(await anext(stream.events), md.FinalEvent)
    assert await read_all(stream) == []
    for _ in range(2):
        assert await stream.text() == stream.text_so_far == TEXT


async def test_what_is_known_is_there_as_soon_as_it_has_arrived():
    source = Source(sse({**HERON[0], "request_id": "42"}))
    stream = opened(source)
    assert (stream.request_id, stream.finish_reason, stream.metrics) == (None, None, None)

    await anext(stream)
    assert (stream.request_id, stream.completed) == ("42", False)

    source.send(sse({**DONE, "reasoning": "Look."}), END)
    assert await stream.text() == "A grey "
    assert (stream.finish_reason, stream.metrics, stream.completed) == ("stop", {"tokens": 3}, True)
    assert stream.reasoning == md.Reasoning("Look.")
    for key in ("request_id", "finish_reason", "metrics", "reasoning", "usage"):
        assert stream[key] == getattr(stream, key)


async def test_segment_says_where_before_it_says_what():
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
    final = {"type": "final", "path": "M 1 1 Z", "parse_error": "odd", "completed": True}
    source = Source(sse({"type": "bbox", "bbox": box}, {"type": "path_delta", "chunk": "M 0 0 Z"}))
    stream = opened(source, SegmentStream, "segment")

    assert await anext(stream.chunk) == "M 0 0 Z"
    assert stream.bbox == stream["bbox"] == md.Region(**box)
    assert stream.path is None

    source.send(sse(final), END)
    assert await stream.text() == "M 0 0 Z"
    assert stream.path == stream["path"] == "M 1 1 Z"
    assert stream.parse_error == stream["parse_error"] == "odd"


async def test_ttft_is_the_time_from_sending_to_the_first_text(clock):
    sent_at = clock.now
    source = Source(3.0, sse({"type": "mood"}), 2.5, sse(HERON[0]), 9.0, sse(DONE), END)
    stream = opened(source, sent_at=sent_at)
    await anext(stream.events)
    assert stream.ttft is None

    await stream.text()

    assert stream.ttft == 5.5


async def test_repr_tells_the_state():
    source = Source(sse(HERON[0]))
    stream = opened(source)
    assert repr(stream) == "<CaptionStream open, 0 characters, request None>"
    await anext(stream)
    assert repr(stream) == "<CaptionStream open, 7 characters, request None>"
    source.send(sse(DONE), END)
    await stream.text()
    assert repr(stream) == "<CaptionStream complete, 7 characters, request 42>"
    other = opened(Source())
    await other.aclose()
    assert repr(other) == "<CaptionStream closed, 0 characters, request None>"


# -- the end -------------------------------------------------------------------------------


async def test_what_is_lost_after_the_end_does_not_matter():
    assert await opened(Source(sse(*HERON, DONE), lost)).text() == TEXT


async def test_closing_a_complete_stream_can_be_cancelled_and_closes_all_the_same():
    class Slow(Source):
        async def finish(self):
            await anyio.sleep_forever()

    source = Slow(sse(*HERON, DONE))
    stream = opened(source)
    await anext(stream)
    with anyio.move_on_after(1):
        await stream.aclose()

    assert source.closed


@pytest.mark.parametrize("double", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_a_stream_can_not_be_copied(double):
    for kind in KINDS.values():
        source = Source()
        stream = opened(source)
        original = kind.hold(stream)
        with pytest.raises(TypeError, match=r"can't be copied|cannot pickle"):
            double(original)
        assert not source.closed
        await stream.aclose()


async def test_a_plain_answer_is_a_stream_of_one_piece():
    decoder = decoder_for("caption")
    events = decoder.body(b'{"caption": "A grey heron.", "request_id": "42"}')
    stream = CaptionStream(Opening(decoder, events=events, sent_at=0.0))

    assert stream.request_id == "42"
    assert await read_all(stream) == ["A grey heron."]
    assert await read_all(stream) == []
    await stream.aclose()
    assert stream.ttft is not None


# -- failures ------------------------------------------------------------------------------


async def test_a_lost_connection_is_the_cause_and_closing_changes_nothing():
    stream = opened(Source(sse(HERON[0]), lost))

    for _ in range(2):
        with pytest.raises(md.StreamInterruptedError) as caught:
            await stream.text()

        assert isinstance(caught.value.__cause__, md.APIConnectionError)
        assert "reset" in str(caught.value.__cause__)
        assert caught.value.partial == "A grey "
        await stream.aclose()


# -- two readers ---------------------------------------------------------------------------


async def test_a_second_reader_is_refused_and_the_first_reads_on():
    source = Source()
    stream = opened(source)
    first = asyncio.create_task(stream.text())
    await until_idle()

    for reader in (stream, stream.chunk, stream.events):
        with pytest.raises(md.MoondreamError, match="Another task is already reading"):
            await anext(reader)

    source.send(sse(*HERON, DONE), END)
    assert await first == TEXT


async def test_readers_may_take_turns():
    source = Source(sse(*HERON, DONE), END)
    stream = opened(source)

    async def read_one():
        return await anext(stream)

    tasks = [asyncio.create_task(read_one()) for _ in HERON]

    assert "".join(await asyncio.gather(*tasks)) == TEXT
    await stream.aclose()


# -- a call with stream=True ---------------------------------------------------------------


async def call(source):
    await asyncio.sleep(0)
    return opened(source)


async def test_a_call_goes_wherever_a_coroutine_can():
    sources = [Source(sse(*HERON, DONE)) for _ in range(3)]
    streams = [
        await asyncio.create_task(StreamCall(call(sources[0]))),
        await asyncio.wait_for(StreamCall(call(sources[1])), 5),
        *await asyncio.gather(StreamCall(call(sources[2]))),
    ]

    assert [await stream.text() for stream in streams] == [TEXT] * 3
    unused = StreamCall(call(Source()))
    assert asyncio.iscoroutine(unused)
    unused.close()


async def test_a_call_that_is_never_awaited_warns_like_any_other():
    with pytest.warns(RuntimeWarning, match="never awaited"):
        StreamCall(call(Source()))

    StreamCall(call(Source())).close()


# -- the whole result ------------------------------------------------------------------------

RESULTS = {
    "caption": (CaptionStream, "caption", [*HERON, DONE], {"caption": TEXT, "request_id": "42"}),
    "kestrel": (
        QueryStream,
        "query",
        [
            {"chunk": "A "},
            {"chunk": "B", "completed": True, "answer": "A B", "reasoning": {"text": "Hm."}},
        ],
        {"answer": "A B", "reasoning": {"text": "Hm.", "grounding": []}},
    ),
    "caption beside a path": (
        CaptionStream,
        "caption",
        [{"chunk": TEXT}, {"chunk": "", "completed": True, "path": "/v1/caption"}],
        {"caption": TEXT},
    ),
    "chat": (
        ChatStream,
        "chat",
        [chat(reasoning="Hm."), chat(content=TEXT), STOP, b"[DONE]"],
        {
            "message": {"role": "assistant", "content": TEXT, "reasoning": "Hm."},
            "finish_reason": "stop",
        },
    ),
}


@pytest.mark.parametrize(("kind", "skill", "bodies", "expected"), RESULTS.values(), ids=RESULTS)
async def test_a_stream_ends_in_the_result_of_the_call_without_it(kind, skill, bodies, expected):
    for read in range(2):
        stream = opened(Source(sse(*bodies), END), kind, skill)
        for _ in range(read):
            await anext(stream.chunk)

        for _ in range(2):
            result = await stream.result()
            assert {key: result[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("last", "path"),
    [
        ({"path": "M 1 1 Z"}, "M 1 1 Z"),
        ({"path": "", "parse_error": "odd"}, ""),
        ({"path": None, "parse_error": "odd"}, ""),
        ({}, "M 0"),
    ],
    ids=["refined", "not read", "not read, None", "coarse alone"],
)
async def test_an_outline_is_read_as_the_official_sdk_gives_it(last, path):
    box = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
    final = {"type": "final", "chunk": "", "bbox": box, "completed": True, **last}
    sent = [{"type": "bbox", "bbox": box}, {"type": "path_delta", "chunk": "M 0"}, final]
    stream = opened(Source(sse(*sent), END), SegmentStream, "segment")

    updates = await read_all(stream)

    assert updates == [
        {"bbox": box},
        {"chunk": "M 0"},
        {"path": path, "bbox": box, "completed": True},
    ]
    assert (await stream.result()).path == path


async def test_the_text_of_one_answer_has_a_limit(monkeypatch):
    monkeypatch.setattr("moondream_async._stream.reading.MAX_ANSWER_CHARACTERS", 1000)
    source = Source(*[sse({"chunk": "x" * 100})] * 50)
    stream = opened(source)

    with pytest.raises(md.StreamProtocolError, match="The answer is over the limit of") as caught:
        await stream.text()

    assert source.closed
    assert 1000 < len(caught.value.partial) <= 1200


async def for_each(call):
    async for _ in call:
        pass


async def enter(call):
    with call:
        pass


MISUSES = {
    "async for": for_each,
    "anext": anext,
    "with": enter,
    "for": iter,
    "item": lambda call: call["chunk"],
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
async def test_what_is_for_the_stream_and_tried_on_the_call_says_the_way_out(misuse):
    async def attempt():
        tried = misuse(StreamCall(call(Source())))
        await tried

    with pytest.raises(TypeError, match=r"stream = await client\.caption"):
        await attempt()


async def test_a_streams_attribute_tried_on_the_call_says_the_way_out():
    unused = StreamCall(call(Source()))

    for name in ("chunk", "events", "text", "result", "request_id", "sse"):
        with pytest.raises(AttributeError, match=f"no '{name}'.*stream = await client"):
            getattr(unused, name)

    assert not hasattr(unused, "colour")
    unused.close()


async def test_a_stream_is_not_entered_without_async():
    async with answered(DONE) as stream:
        with pytest.raises(TypeError, match="async with"), stream:
            pass
