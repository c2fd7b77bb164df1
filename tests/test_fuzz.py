"""Whatever bytes arrive, in whatever cuts: text and then an end, or one of our errors.

The decoder alone is tried in test_two_ways.py. Here the whole stream is, over bytes in
memory and however it is read, and the whole client, over sockets and whatever comes in
place of HTTP.
"""

import asyncio
import gzip
import zlib

import pytest
from canned import IMAGE, played
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from raw_server import (
    ANSWER,
    CHUNKED,
    DONE,
    EVENT_STREAM,
    EVENTS,
    STREAM,
    TEXT,
    RawServer,
    event,
    head,
    in_chunks,
    whole,
)
from sources import END, Source, closed_by_client, lost, opened
from test_two_ways import SKILLS, randomly_cut, streams

import moondream_async as md
from moondream_async._stream.kinds import CaptionStream, ChatStream, QueryStream, SegmentStream

pytestmark = pytest.mark.own_time

CLASSES = {
    "caption": CaptionStream,
    "query": QueryStream,
    "segment": SegmentStream,
    "chat": ChatStream,
}

fuzzing = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the clock only goes on
)


# -- a stream over bytes in memory ----------------------------------------------------


def ending(stream, error):
    """How a stream ended, and all that it knows."""
    known = (
        stream.text_so_far,
        stream.completed,
        stream.request_id,
        stream.finish_reason,
        stream.metrics,
        stream.reasoning,
        stream.usage,
    )
    return (type(error), str(error), getattr(error, "partial", None), *known)


async def read_to_the_end(stream, plan=()):
    """Read as planned and then to the end; return what was got, and how it ended.

    A plan is made of "text" and "event".
    """
    got = []
    events = stream.events
    steps = iter(plan)
    while True:
        step = next(steps, "text")
        try:
            if step == "text":
                got.append(await anext(stream.chunk))
            else:
                got.append((await anext(events)).chunk)
        except StopAsyncIteration:
            return "".join(got), None
        except md.MoondreamError as error:
            return "".join(got), error


# Ends are made anew for each source.
ends = st.sampled_from([END, lost, closed_by_client])
plans = st.lists(st.sampled_from(["text", "event"]), max_size=30)


@fuzzing
@given(skill=SKILLS, wire=streams, end=ends, plan=plans, data=st.data())
async def test_any_bytes_in_any_cuts_read_in_any_way_end_alike(skill, wire, end, plan, data):
    first = opened(Source(wire, end), CLASSES[skill], skill)
    text, error = await read_to_the_end(first)
    assert text == first.text_so_far
    if error is None:
        assert first.completed
    else:
        assert getattr(error, "partial", text) == text
        assert isinstance(error, md.StreamError | md.ClientClosedError)
    again, error_again = await read_to_the_end(first)
    assert (again, type(error_again)) == ("", type(error))
    await first.aclose()

    script = []  # the same in pieces, with pauses
    for packet in randomly_cut(data.draw, wire):
        script += [data.draw(st.sampled_from([0, 0, 0.5, 1.0])), packet]
    source = Source(*[each for each in script if each], end)
    second = opened(source, CLASSES[skill], skill)
    text_in_pieces, error_in_pieces = await read_to_the_end(second, plan)
    assert text_in_pieces == text
    assert ending(second, error_in_pieces) == ending(first, error)
    await second.aclose()
    assert source.closed


@fuzzing
@given(skill=SKILLS, wire=streams, end=ends, at=st.integers(0, 20), data=st.data())
@pytest.mark.slow
async def test_stream_of_any_bytes_closed_at_any_moment_keeps_what_it_gave(
    skill, wire, end, at, data
):
    source = Source(*filter(None, randomly_cut(data.draw, wire)), end)
    stream = opened(source, CLASSES[skill], skill)
    got = ""
    error = None
    for _ in range(at):
        try:
            got += await anext(stream.chunk)
        except StopAsyncIteration:
            break
        except md.MoondreamError as caught:
            error = caught
            break
    await stream.aclose()
    assert source.closed
    assert stream.text_so_far == got
    rest, end_error = await read_to_the_end(stream)
    assert rest == ""
    assert error is None or type(end_error) is type(error)


# -- the client over sockets ----------------------------------------------------------

PLAIN = whole(ANSWER)
PACKED = gzip.compress(b'{"caption": "A cat sleeps."}')
RESPONSES = [
    PLAIN,
    STREAM,
    head(EVENT_STREAM) + b"".join([*EVENTS, DONE]),
    head(CHUNKED, EVENT_STREAM) + in_chunks(*EVENTS, event(error="no memory")),
    whole({"error": {"message": "no", "type": "t", "code": 1}}, status="400 Bad Request"),
    whole(b"<html>", status="502 Bad Gateway", kind="text/html"),
    head("Location: /v1/caption", "Content-Length: 0", status="307 Temporary Redirect"),
    head(f"Content-Length: {len(PACKED)}", "Content-Encoding: gzip", "Content-Type: text/plain")
    + PACKED,
    head(CHUNKED, "Content-Encoding: deflate") + in_chunks(zlib.compress(STREAM)),
    head(status="100 Continue") + PLAIN,
    head("Connection: upgrade", "Upgrade: h2c", status="101 Switching Protocols"),
    head(status="204 No Content"),
    head("Content-Length: 0", status="304 Not Modified"),
]
TOKENS = [
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\0", b"\xff", b" ", b":"),
    b"0\r\n\r\n",
    b"FFFFFFFFFFFFFFFF\r\n",
    b"-1\r\n",
    b"5;x=y\r\nhello\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/9.9 -5\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Content-Encoding: br\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Type: text/event-stream\r\n",
    b"Content-Type: \xe4; charset=\xff\r\n",
    b"Connection: close\r\n",
    b"Location: http://[\r\n",
    b"Location: ../../..//x\r\n",
    b"Location: \xff\xfe\r\n",
    b"Set-Cookie: a=b; Domain=\xff\r\n",
    b"Retry-After: 99999999999999999999\r\n",
    b"X: " + b"x" * 70_000 + b"\r\n",
    b"data: ",
    b'{"chunk": "',
    b"[" * 2000,
]
spots = st.integers(0, 400)
mutations = st.lists(
    st.tuples(st.just("insert"), spots, st.sampled_from(TOKENS) | st.binary(max_size=8))
    | st.tuples(st.just("delete"), spots, st.integers(1, 60))
    | st.tuples(st.just("flip"), spots, st.integers(1, 255))
    | st.tuples(st.just("repeat"), spots, st.integers(1, 60)),
    max_size=4,
)


def mutated(response, changes):
    for kind, spot, what in changes:
        at = spot % (len(response) + 1)
        before, after = response[:at], response[at:]
        if kind == "insert":
            response = before + what + after
        elif kind == "delete":
            response = before + after[what:]
        elif kind == "repeat":
            response = before + after[:what] + after
        elif after:
            response = before + bytes([after[0] ^ what]) + after[1:]
    return response


@fuzzing
@given(
    response=st.builds(mutated, st.sampled_from(RESPONSES), mutations) | st.binary(max_size=300),
    stream=st.booleans(),
    cut=spots,
)
@example(response=b"", stream=True, cut=0)
@example(response=PLAIN, stream=True, cut=200)
@example(response=head("Location: \x7f", status="307 Moved"), stream=False, cut=0)
@example(response=head("Location: http://a..b/", status="307 Moved"), stream=False, cut=0)
async def test_whatever_comes_in_place_of_an_answer_is_an_answer_or_our_error(
    response, stream, cut
):
    async def play(peer):
        await peer.request()
        await peer.send(response[:cut])
        await asyncio.sleep(0)
        await peer.send(response[cut:])

    async with played(play) as (_, client):
        try:
            answer = await client.caption(IMAGE, stream=stream)
            if stream:
                async with answer:
                    text = await answer.text()
                assert answer.completed
            else:
                text = answer.caption
            assert isinstance(text, str)
        except md.MoondreamError:
            pass
        else:
            assert response != STREAM or text == TEXT
        assert client.stats().open_streams == 0


@fuzzing
@given(path=st.text(max_size=20) | st.sampled_from(["a b", "\x7f", "ä", "%", "%zz", "//", ".."]))
async def test_any_endpoint_is_refused_or_asked(path):
    async def play(peer):
        await peer.request()
        await peer.send(PLAIN)

    async with RawServer(play) as server:
        endpoint = f"{server.origin}/{path}"
        try:
            client = md.MoondreamClient(endpoint=endpoint, max_retries=0)
        except md.RequestError:
            return
        async with client:
            assert (await client.caption(IMAGE)).caption == TEXT


def test_endpoint_on_no_host_is_refused():
    for host in ("", ".", "a..b", "a" * 70, "\x7f", "a b", "[::1", "a:b", "a:-1"):
        with pytest.raises(md.RequestError):
            md.MoondreamClient(endpoint=f"http://{host}/v1")
