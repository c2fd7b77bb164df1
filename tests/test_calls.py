"""What is tried again, and which limit runs out, over real sockets.

Limits are short here, and servers wait for events, so that nothing is timed.
"""

import asyncio
import contextlib
import socket
import traceback
from pathlib import Path

import anyio
import pytest
from canned import IMAGE
from raw_server import (
    DONE,
    EVENT_STREAM,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer,
    event,
    head,
    in_chunks,
    whole,
)

import moondream_async as md

SOON = 0.05  # seconds, of limits that are meant to run out


def client_of(server, **options):
    return md.MoondreamClient(endpoint=server.endpoint, **options)


def play_in_turn(*plays):
    """Play each on one request, in this order, and answer all that follow."""
    left = list(plays)

    async def play(peer):
        while left:
            request = await peer.request()
            if not await left.pop(0)(peer, request):
                return
        while True:
            await answer(peer)

    return play


def saying(data, *, reset=None):
    """Send `data` and keep the connection, or end or reset it."""

    async def play(peer, _request):
        await peer.send(data)
        if reset:
            peer.reset()
        return reset is None

    return play


def status(code, body=b"", *headers):
    return saying(whole(body, "Retry-After: 0", *headers, status=f"{code} Simulated"))


async def call(client, stream):
    if stream:
        async with client.caption(IMAGE, stream=True) as opened:
            return await opened.text()
    return (await client.caption(IMAGE)).caption


both = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


# -- tried again ----------------------------------------------------------------------


@both
@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504, *range(520, 525)])
async def test_status_that_passes_by_itself_is_tried_again(code, stream):
    async with (
        RawServer(play_in_turn(status(code), status(code))) as server,
        client_of(server, max_retries=2) as client,
    ):
        assert await call(client, stream) == TEXT
        assert len(server.requests) == 3
        assert len({request.body for request in server.requests}) == 1


OTHERS = [400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 418, 422, 451, 501, 505, 511, 525, 599]


@both
@pytest.mark.parametrize("code", OTHERS)
async def test_any_other_status_is_not_tried_again(code, stream):
    async with (
        RawServer(play_in_turn(status(code, {"error": "no"}))) as server,
        client_of(server, max_retries=2) as client,
    ):
        with pytest.raises(md.APIStatusError, match="no") as caught:
            await call(client, stream)
        assert caught.value.status == code
        assert len(server.requests) == 1


@pytest.mark.parametrize("code", [400, 422])
async def test_refusal_to_reason_in_a_stream_is_asked_again_without(code):
    answer = saying(whole({"answer": TEXT, "reasoning": {"text": "Hm.", "grounding": []}}))
    refusal = status(code, {"error": "no streaming with reasoning"})
    async with (
        RawServer(play_in_turn(refusal, answer)) as server,
        client_of(server, max_retries=0) as client,
    ):
        stream = await client.query(IMAGE, "Why?", reasoning=True, stream=True)
        assert await stream.text() == TEXT
        assert [request.json.get("stream", False) for request in server.requests] == [True, False]


@both
async def test_burst_of_refusals_is_outlasted(stream):
    burst = [status(429), status(503), status(429)]
    async with RawServer(play_in_turn(*burst)) as server, client_of(server) as client:
        assert await call(client, stream) == TEXT
        assert len(server.requests) == 4


@both
async def test_when_no_try_is_left_the_last_error_is_raised(stream):
    burst = [status(429), status(503), status(500, {"error": "the last"})]
    async with (
        RawServer(play_in_turn(*burst)) as server,
        client_of(server, max_retries=2) as client,
    ):
        with pytest.raises(md.ServerError, match="the last"):
            await call(client, stream)
        assert len(server.requests) == 3


@both
@pytest.mark.parametrize(("said", "again"), [("rejected", True), ("timeout", False)])
async def test_of_what_station_says_with_status_200_only_a_full_queue_is_tried_again(
    said, again, stream
):
    body = whole({"error": "Queue is full", "status": said})
    async with (
        RawServer(play_in_turn(saying(body))) as server,
        client_of(server, max_retries=1) as client,
    ):
        if again:
            assert await call(client, stream) == TEXT
        else:
            with pytest.raises(md.ServerError, match="Queue is full"):
                await call(client, stream)
        assert len(server.requests) == 1 + again


@both
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_connection_lost_before_the_answer_is_tried_again(stream, reset):
    async with (
        RawServer(play_in_turn(saying(b"", reset=reset))) as server,
        client_of(server, max_retries=1) as client,
    ):
        assert await call(client, stream) == TEXT
        assert len(server.requests) == 2


BEGINNINGS = {
    "head": STREAM_HEAD,
    "heartbeats": STREAM_HEAD + in_chunks(b": ping\n\n: ping\n\n", end=False),
    "half-an-event": STREAM_HEAD + in_chunks(EVENTS[0][:10], end=False),
    "nothing-in-good-order": STREAM_HEAD + in_chunks(),
    "half-a-chunk": STREAM_HEAD + b"ff\r\ndata:",
    "no-length": head(EVENT_STREAM),
    "length-not-reached": head(EVENT_STREAM, "Content-Length: 100"),
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_stream_lost_before_its_first_event_is_asked_for_again(beginning, reset):
    lost = saying(BEGINNINGS[beginning], reset=reset)
    async with (
        RawServer(play_in_turn(lost)) as server,
        client_of(server, max_retries=1) as client,
    ):
        assert await call(client, stream=True) == TEXT
        assert len(server.requests) == 2


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_stream_lost_after_its_first_event_is_not_asked_for_again(reset):
    lost = saying(STREAM_HEAD + in_chunks(EVENTS[0], end=False), reset=reset)
    async with RawServer(play_in_turn(lost)) as server, client_of(server) as client:
        with pytest.raises(md.StreamInterruptedError):
            await call(client, stream=True)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    "play",
    [
        status(503),
        saying(whole({"error": "Queue is full", "status": "rejected"})),
        saying(b"", reset=False),
        saying(b"", reset=True),
        saying(STREAM_HEAD, reset=False),
        saying(STREAM_HEAD, reset=True),
    ],
    ids=["status", "rejected", "closed", "reset", "head-closed", "head-reset"],
)
@both
async def test_without_retries_everything_is_sent_once(play, stream):
    async with (
        RawServer(play_in_turn(play)) as server,
        client_of(server, max_retries=0) as client,
    ):
        with pytest.raises(md.MoondreamError):
            await call(client, stream)
        assert len(server.requests) == 1


@both
async def test_server_that_was_not_there_is_called_again(stream):
    """The port is closed at first; it is opened as soon as the client is about to retry."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        refused = asyncio.Event()
        endpoint = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
        hooks = md.Hooks(retry=lambda event: refused.set())
        async with md.MoondreamClient(endpoint=endpoint, max_retries=1, hooks=hooks) as client:
            calling = asyncio.ensure_future(call(client, stream))
            await refused.wait()
            async with RawServer(answer, sock=sock):
                assert await calling == TEXT


@pytest.mark.parametrize("value", ["7", "7.0"])
async def test_retry_after_is_waited_for(value):
    delays = asyncio.Queue()
    hooks = md.Hooks(retry=lambda event: delays.put_nowait(event.delay))
    refusal = whole(b"", f"Retry-After: {value}", status="503 Busy")
    async with (
        RawServer(play_in_turn(saying(refusal))) as server,
        client_of(server, hooks=hooks) as client,
    ):
        calling = asyncio.ensure_future(client.caption(IMAGE))
        assert await delays.get() == 7
        calling.cancel()
        await asyncio.wait([calling])


# -- out of time ----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def out_of_time(phase, error=md.APITimeoutError):
    """The block runs into the limit of a phase, and the error says so."""
    with anyio.fail_after(30), pytest.raises(error, match=rf"Timeout\.{phase}") as caught:
        yield
    assert caught.value.phase == phase
    assert isinstance(caught.value, TimeoutError)


async def until_gone(peer):
    await peer.request()
    await peer.until_gone()


async def assert_free(client, server):
    """The connection is dropped, and its place free."""
    with anyio.fail_after(30):
        await server.until_idle()
    assert repr(client).endswith("0 open>")


@both
async def test_no_free_place_is_out_of_time_with_the_number_of_open_streams(stream):
    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        await peer.until_gone()

    async with (
        RawServer(play) as server,
        client_of(server, timeout=md.Timeout(pool=SOON), max_connections=2) as client,
    ):
        streams = [await client.caption(IMAGE, stream=True) for _ in range(2)]
        async with out_of_time("pool"):
            await call(client, stream)
        with pytest.raises(md.APITimeoutError, match=r"2 streams .* max_connections=2"):
            await call(client, stream)
        assert len(server.requests) == 2
        for opened in streams:
            await opened.aclose()
        await assert_free(client, server)


@pytest.fixture
def full_backlog():
    """A listening socket that takes no more connections: the next one hangs."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(5):
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@both
async def test_connection_that_is_not_made_is_out_of_time(full_backlog, stream):
    timeout = md.Timeout(connect=SOON)
    async with (
        md.MoondreamClient(endpoint=full_backlog, timeout=timeout, max_retries=0) as client,
        out_of_time("connect"),
    ):
        await call(client, stream)


@both
async def test_tls_that_is_not_answered_is_out_of_time(stream):
    async def play(peer):
        await peer.until_gone()

    async with RawServer(play) as server:
        endpoint = server.endpoint.replace("http:", "https:")
        timeout = md.Timeout(connect=SOON)
        async with md.MoondreamClient(endpoint=endpoint, timeout=timeout, max_retries=0) as client:
            async with out_of_time("connect"):
                await call(client, stream)
            await assert_free(client, server)


async def trickle(peer, *pieces):
    """Send the pieces again and again, without an end."""
    while True:
        for piece in pieces:
            await peer.send(piece)
            await asyncio.sleep(SOON / 10)


def after(start, *pieces):
    """Send the start of an answer, then trickle the pieces; or be silent if there are none."""

    async def play(peer):
        await peer.request()
        await peer.send(start)
        if pieces:
            await trickle(peer, *pieces)
        await peer.until_gone()

    return play


HEARTBEAT = in_chunks(b": ping\n\n", end=False)
NAME = in_chunks(b"event: half\n", end=False)
LETTER = in_chunks(b"x", end=False)
HALF = in_chunks(b'data: {"chunk": "', end=False)
JSON_HEAD = head("Content-Type: application/json", "Content-Length: 1000000")

SILENCES = {
    "no-answer": until_gone,
    "half-a-head": after(STREAM_HEAD[:20]),
    "informational": after(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "head": after(STREAM_HEAD),
    "heartbeats": after(STREAM_HEAD, HEARTBEAT),
    "half-an-event": after(STREAM_HEAD + HALF),
    "letter-by-letter": after(STREAM_HEAD + HALF, LETTER),
    "fields": after(STREAM_HEAD, NAME),
    "half-a-json": after(JSON_HEAD + b'{"caption": "'),
    "json-letter-by-letter": after(JSON_HEAD + b'{"caption": "', b"x"),
    "text-that-may-be-json": after(head("Content-Type: text/plain"), b" "),
}


@both
@pytest.mark.parametrize("silence", SILENCES)
async def test_answer_that_does_not_begin_is_out_of_time(silence, stream):
    async with (
        RawServer(SILENCES[silence]) as server,
        client_of(server, timeout=md.Timeout(first_event=SOON)) as client,
    ):
        async with out_of_time("first_event"):
            await call(client, stream)
        await assert_free(client, server)
        assert len(server.requests) == 1  # a model that is slow once is slow twice


START = STREAM_HEAD + in_chunks(EVENTS[0], end=False)
STALLS = {
    "silence": after(START),
    "heartbeats": after(START, HEARTBEAT),
    "half-an-event": after(START + HALF),
    "letter-by-letter": after(START + HALF, LETTER),
    "fields": after(START, NAME),
    "half-a-chunk": after(START + b"fff\r\ndata: "),
}


@pytest.mark.parametrize("stall", STALLS)
async def test_stream_that_stalls_is_out_of_time_with_the_text_so_far(stall):
    async with (
        RawServer(STALLS[stall]) as server,
        client_of(server, timeout=md.Timeout(idle=SOON)) as client,
    ):
        stream = await client.caption(IMAGE, stream=True)
        async with out_of_time("idle", md.StreamStalledError):
            await stream.text()
        with pytest.raises(md.StreamStalledError) as caught:
            await stream.text()
        assert caught.value.partial == stream.text_so_far == "A "
        await assert_free(client, server)


TOTALS = {
    "no-answer": until_gone,
    "head": after(STREAM_HEAD),
    "heartbeats": after(STREAM_HEAD, HEARTBEAT),
    "half-a-json": after(JSON_HEAD, b"x"),
}


@both
@pytest.mark.parametrize("play", TOTALS)
async def test_call_that_takes_too_long_in_all_is_out_of_time(play, stream):
    timeout = md.Timeout(total=SOON, first_event=None)
    async with (
        RawServer(TOTALS[play]) as server,
        client_of(server, timeout=timeout) as client,
    ):
        async with out_of_time("total"):
            await call(client, stream)
        await assert_free(client, server)


async def test_stream_that_takes_too_long_in_all_is_out_of_time_with_the_text_so_far():
    async with (
        RawServer(after(START, in_chunks(event("x"), end=False))) as server,
        client_of(server, timeout=md.Timeout(total=3 * SOON, idle=30)) as client,
    ):
        stream = await client.caption(IMAGE, stream=True)
        async with out_of_time("total", md.StreamStalledError):
            await stream.text()
        assert stream.text_so_far.startswith("A ")
        await assert_free(client, server)


async def test_waiting_in_line_counts_towards_the_total():
    async with (
        RawServer(after(STREAM_HEAD)) as server,
        client_of(server, timeout=md.Timeout(total=1), max_connections=1) as client,
        client.caption(IMAGE, stream=True),
        out_of_time("total"),
    ):
        await client.caption(IMAGE)


@pytest.mark.slow
async def test_slow_reader_is_never_out_of_time():
    pieces = [str(number) + "x" * 5000 for number in range(2000)]  # more than the kernel holds

    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        for piece in pieces:
            await peer.send(in_chunks(event(piece), end=False))
        await peer.send(in_chunks(DONE))

    async with (
        RawServer(play) as server,
        client_of(server, timeout=md.Timeout(first_event=0.5, idle=0.5)) as client,
    ):
        stream = await client.caption(IMAGE, stream=True)
        await asyncio.sleep(0.7)
        got = []
        async for piece in stream:
            got.append(piece)
            if len(got) % 1000 == 1:
                await asyncio.sleep(0.7)
        assert got == pieces


@both
async def test_another_try_that_would_come_too_late_is_not_waited_for(stream):
    refusal = whole({"error": "come back tomorrow"}, "Retry-After: 86400", status="503 Busy")
    async with (
        RawServer(play_in_turn(saying(refusal))) as server,
        client_of(server, timeout=md.Timeout(total=30)) as client,
    ):
        with pytest.raises(md.ServerError, match="tomorrow") as caught:
            await call(client, stream)
        assert caught.value.retry_after == 86400
        assert len(server.requests) == 1


@both
async def test_no_limit_at_all_is_no_trouble(stream):
    timeout = md.Timeout(pool=None, connect=None, first_event=None, idle=None, total=None)
    async with RawServer(answer) as server, client_of(server, timeout=timeout) as client:
        assert await call(client, stream) == TEXT


# -- how deep a call is ----------------------------------------------------------------

OURS = str(Path(md.__file__).parent)


@both
async def test_between_a_call_and_aiohttp_are_four_coroutines_at_most(stream):
    begun = asyncio.Event()

    async def play(peer):
        await peer.request()
        begun.set()
        await peer.until_gone()

    async with RawServer(play) as server, client_of(server) as client:
        asked = client.caption(IMAGE, stream=stream)
        task = asyncio.create_task(asked)
        await begun.wait()
        awaited, names = getattr(asked, "_call", asked), []
        while awaited is not None:
            code = getattr(awaited, "cr_code", None)
            if code is not None and code.co_filename.startswith(OURS):
                names.append(code.co_qualname)
            awaited = getattr(awaited, "cr_await", None)
        assert len(names) <= 4
        assert names[-1] == "Pool.request"
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("picture", ["nowhere.jpg", b"no picture", b"\xff\xd8\xff" + bytes(50)])
async def test_traceback_of_a_picture_that_cannot_be_read_is_short(picture):
    client = md.MoondreamClient(endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(md.ImageError) as caught:
        await client.caption(picture)
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.count(f'File "{OURS}') <= 8, shown
    await client.aclose()
