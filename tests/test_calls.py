"""What is tried again, over real sockets, and how deep a call is."""

import asyncio
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


def saying(data, end="keep"):
    """Send `data` and keep the connection, or close or reset it."""

    async def play(peer, _request):
        await peer.send(data)
        if end == "reset":
            peer.reset()
        return end == "keep"

    return play


def status(code, body=b"", *headers):
    return saying(whole(body, "Retry-After: 0", *headers, status=f"{code} Simulated"))


async def call(client, stream):
    if stream:
        async with client.caption(IMAGE, stream=True) as opened:
            return await opened.text()
    return (await client.caption(IMAGE)).caption


both = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


# -- tried again; which errors are is in `test_retry.py` --------------------------------


def station(said):
    """What Station says with status 200."""
    return saying(whole({"error": "Queue is full", "status": said}))


PASSING = {
    "status": status(503),
    "rejected": station("rejected"),
    "closed": saying(b"", "close"),
    "reset": saying(b"", "reset"),
}
BEGUN = {  # of a stream, and no event yet
    "head": saying(STREAM_HEAD, "close"),
    "head-reset": saying(STREAM_HEAD, "reset"),
    "heartbeats": saying(STREAM_HEAD + in_chunks(b": ping\n\n" * 2, end=False), "close"),
    "half-an-event": saying(STREAM_HEAD + in_chunks(EVENTS[0][:10], end=False), "close"),
    "half-an-event-reset": saying(STREAM_HEAD + in_chunks(EVENTS[0][:10], end=False), "reset"),
    "nothing-in-good-order": saying(STREAM_HEAD + in_chunks(), "close"),
    "half-a-chunk": saying(STREAM_HEAD + b"ff\r\ndata:", "close"),
    "no-length": saying(head(EVENT_STREAM), "close"),
    "length-not-reached": saying(head(EVENT_STREAM, "Content-Length: 100"), "reset"),
}
LOST = [
    *((name, stream) for name in PASSING for stream in (False, True)),
    *((n, True) for n in BEGUN),
]


@pytest.mark.parametrize(("name", "stream"), LOST)
async def test_what_another_attempt_helps_is_tried_again_and_once_without_retries(name, stream):
    lost = (PASSING | BEGUN)[name]
    async with played(play_in_turn(lost)) as (server, client):
        with pytest.raises(md.MoondreamError) as caught:
            await call(client, stream)
        assert getattr(caught.value, "partial", "") == ""
        assert len(server.requests) == 1
    async with played(play_in_turn(lost), max_retries=1) as (server, client):
        assert await call(client, stream) == TEXT
        assert len(server.requests) == 2
        assert len({request.body for request in server.requests}) == 1


@both
@pytest.mark.parametrize("lost", [status(409), station("timeout")], ids=["409", "200"])
async def test_what_no_other_attempt_helps_is_not_tried_again(lost, stream):
    async with played(play_in_turn(lost), max_retries=2) as (server, client):
        with pytest.raises(md.APIStatusError):
            await call(client, stream)
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


# -- how deep a call is ----------------------------------------------------------------

OURS = str(Path(md.__file__).parent)


@both
async def test_between_a_call_and_aiohttp_are_four_coroutines_at_most(stream):
    begun = asyncio.Event()

    async def play(peer):
        await peer.request()
        begun.set()
        await peer.until_gone()

    async with played(play) as (_, client):
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
