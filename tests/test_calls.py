"""What is tried again, over real sockets, and how deep a call is."""

import asyncio
import contextlib
import socket
import traceback
from pathlib import Path

import pytest
from canned import IMAGE, played
from raw_server import (
    EVENT_STREAM,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer,
    head,
    in_chunks,
    whole,
)

import moondream_async as md


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
    async with played(play_in_turn(status(code), status(code)), max_retries=2) as (server, client):
        assert await call(client, stream) == TEXT
        assert len(server.requests) == 3
        assert len({request.body for request in server.requests}) == 1


OTHERS = [400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 418, 422, 451, 501, 505, 511, 525, 599]


@both
@pytest.mark.parametrize("code", OTHERS)
async def test_any_other_status_is_not_tried_again(code, stream):
    async with played(play_in_turn(status(code, {"error": "no"})), max_retries=2) as (
        server,
        client,
    ):
        with pytest.raises(md.APIStatusError, match="no") as caught:
            await call(client, stream)
        assert caught.value.status == code
        assert len(server.requests) == 1


@pytest.mark.parametrize("code", [400, 422])
async def test_refusal_to_reason_in_a_stream_is_asked_again_without(code):
    answer = saying(whole({"answer": TEXT, "reasoning": {"text": "Hm.", "grounding": []}}))
    refusal = status(code, {"error": "no streaming with reasoning"})
    async with played(play_in_turn(refusal, answer)) as (server, client):
        stream = await client.query(IMAGE, "Why?", reasoning=True, stream=True)
        assert await stream.text() == TEXT
        assert [request.json.get("stream", False) for request in server.requests] == [True, False]


@both
async def test_when_no_try_is_left_the_last_error_is_raised(stream):
    burst = [status(429), status(503), status(500, {"error": "the last"})]
    async with played(play_in_turn(*burst), max_retries=2) as (server, client):
        with pytest.raises(md.ServerError, match="the last"):
            await call(client, stream)
        assert len(server.requests) == 3


@both
@pytest.mark.parametrize(("said", "again"), [("rejected", True), ("timeout", False)])
async def test_of_what_station_says_with_status_200_only_a_full_queue_is_tried_again(
    said, again, stream
):
    body = whole({"error": "Queue is full", "status": said})
    async with played(play_in_turn(saying(body)), max_retries=1) as (server, client):
        if again:
            assert await call(client, stream) == TEXT
        else:
            with pytest.raises(md.ServerError, match="Queue is full"):
                await call(client, stream)
        assert len(server.requests) == 1 + again


@both
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_connection_lost_before_the_answer_is_tried_again(stream, reset):
    async with played(play_in_turn(saying(b"", reset=reset)), max_retries=1) as (server, client):
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
    async with played(play_in_turn(lost), max_retries=1) as (server, client):
        assert await call(client, stream=True) == TEXT
        assert len(server.requests) == 2


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
    async with played(play_in_turn(play)) as (server, client):
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


# -- out of time; `test_deadlines.py` has all limits, in a time of its own ---------------


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
    timeout = md.Timeout(connect=0.05)
    async with md.MoondreamClient(endpoint=full_backlog, timeout=timeout, max_retries=0) as client:
        with pytest.raises(md.APITimeoutError, match=r"Timeout\.connect") as caught:
            await call(client, stream)
        assert caught.value.phase == "connect"


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
