"""Another try at a stream: before its first event, and never after."""

from collections import deque

import pytest
from decoding import sse
from sources import (
    DONE,
    END,
    HERON,
    TEXT,
    Source,
    closed_by_client,
    lost,
    opened,
    read_all,
)

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.opening import Opening

pytestmark = pytest.mark.own_time


class Reopening:
    """Gives one opening after the other, or raises what stands in its place."""

    def __init__(self, *openings):
        self.failures = []
        self._openings = deque(openings)

    async def __call__(self, error):
        self.failures.append(error)
        opening = self._openings.popleft() if self._openings else error
        if isinstance(opening, Exception):
            raise opening
        return opening


def opening(*script, sent_at=None):
    return Opening(decoder_for("caption"), Source(*script), sent_at=sent_at)


async def test_it_may_be_lost_more_than_once():
    reopen = Reopening(opening(END), opening(lost), opening(sse(*HERON, DONE)))

    assert await opened(Source(END), reopen=reopen).text() == TEXT
    assert len(reopen.failures) == 3


@pytest.mark.parametrize(
    "body",
    [HERON[0], {"type": "mood"}, {"chunk": ""}, {"stats": {}}, {"type": "bbox", "bbox": None}],
    ids=["text", "an unknown event", "an empty chunk", "statistics", "a box"],
)
async def test_after_an_event_a_stream_is_never_asked_for_again(body):
    reopen = Reopening(opening(sse(*HERON, DONE)))
    stream = opened(Source(sse(body), lost), reopen=reopen)

    with pytest.raises(md.StreamInterruptedError):
        await stream.text()

    assert reopen.failures == []


@pytest.mark.parametrize(
    ("script", "cls"),
    [
        ([sse({"error": "boom"})], md.StreamServerError),
        ([b"data: odd\n\n"], md.StreamProtocolError),
        ([200], md.APITimeoutError),
        ([closed_by_client], md.ClientClosedError),
    ],
    ids=["error event", "no JSON", "timeout", "client closed"],
)
async def test_what_another_attempt_would_not_help_is_not_tried(script, cls):
    reopen = Reopening(opening(sse(*HERON, DONE)))
    stream = opened(Source(*script), reopen=reopen)

    with pytest.raises(cls):
        await stream.text()

    assert reopen.failures == []


async def test_when_no_try_is_left_the_stream_was_interrupted():
    stream = opened(Source(lost), reopen=Reopening())

    for _ in range(2):
        with pytest.raises(md.StreamInterruptedError) as caught:
            await stream.text()
        assert str(caught.value.__cause__) == "The connection was lost: reset"


async def test_what_was_lost_before_is_no_cause_of_what_is_lost_later():
    stream = opened(Source(lost), reopen=Reopening(opening(sse(HERON[0]), END)))

    with pytest.raises(md.StreamInterruptedError) as caught:
        await stream.text()

    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "error",
    [
        md.BadRequestError("no", status=400, code="odd"),
        md.APITimeoutError("late", phase="pool"),
        md.ClientClosedError("closed"),
    ],
    ids=["refused", "timeout", "client closed"],
)
async def test_a_try_that_fails_raises_what_it_raised_and_so_does_reading_on(error):
    stream = opened(Source(lost), reopen=Reopening(error))

    with pytest.raises(type(error)) as caught:
        await stream.text()
    assert caught.value is error
    for reading in (anext(stream), stream.text(), stream.result(), anext(stream.events)):
        with pytest.raises(type(error)) as caught:
            await reading
        assert caught.value.__reduce__() == error.__reduce__()
        assert caught.value.__cause__ is None


async def test_another_attempt_that_is_answered_in_one_piece_is_read():
    decoder = decoder_for("caption")
    events = decoder.body(b'{"caption": "A grey heron stands.", "request_id": "43"}')
    stream = opened(Source(END), reopen=Reopening(Opening(decoder, events=events)))

    assert await read_all(stream) == [TEXT]
    assert (stream.completed, stream.request_id, stream.text_so_far) == (True, "43", TEXT)


async def test_ttft_is_counted_from_the_try_that_was_answered(clock):
    reopen = Reopening(opening(7, sse(*HERON, DONE), sent_at=clock.now + 50))
    stream = opened(Source(50, END), reopen=reopen, sent_at=clock.now)

    await stream.text()

    assert stream.ttft == 7


async def test_another_attempt_starts_its_own_clock():
    reopen = Reopening(opening(4, sse(*HERON, DONE)))
    stream = opened(Source(4, END), reopen=reopen, timeout=md.Timeout(first_event=5))

    assert await stream.text() == TEXT


async def test_a_try_that_succeeds_as_the_stream_is_closed_is_closed_too():
    late = opening(sse(*HERON, DONE))
    stream = None

    async def reopen(error):
        await stream.aclose()
        return late

    stream = opened(Source(END), reopen=reopen)

    with pytest.raises(md.ClientClosedError):
        await stream.text()
    assert late.source.closed
