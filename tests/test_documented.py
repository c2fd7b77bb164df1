"""What is known of the wire from outside, over sockets; without them it is all in other files.

Those are `test_requests.py`, `test_answers.py` and `test_events.py`. Their ids say from where:

``docs`` is m87-labs/md-docs at the commit named, ``sdk`` the package moondream 2.6.1,
``station`` the package moondream-station 0.1.9, ``kestrel`` the HTTP server that
m87-labs/kestrel carried from 2025-10 to 2026-03, ``old`` the server of moondream 0.0.6,
``seen`` what users of the live cloud have published. Texts and numbers are ours where
the source has none that are short.
"""

import pytest
from canned import canned
from raw_server import STREAM_HEAD, in_chunks, whole
from test_events import STREAMS, WIRE, skill_of

import moondream_async as md

QUESTION = "How many people?"
HELLO = [{"role": "user", "content": "Hello"}]


async def test_starting_engine_is_told_from_a_ready_one():
    """Kestrel has ``/healthz`` and no ``/health``."""
    gone = whole(b"Not Found", status="404 Not Found", kind="text/plain")
    starting = whole({"status": "starting"}, status="503 Service Unavailable")
    async with canned(gone, starting, gone, whole({"status": "ok"})) as (client, _):
        expected = md.Health(ok=False, status="starting", raw={"status": "starting"})
        assert await client.health() == expected
        assert (await client.health()).ok


CALLS = {
    "caption": lambda client, photo: client.caption(photo, stream=True),
    "query": lambda client, photo: client.query(photo, QUESTION, stream=True),
    "segment": lambda client, photo: client.segment(photo, "person", stream=True),
    "chat": lambda client, photo: client.chat(HELLO, stream=True),
}


async def test_streams_are_read_as_documented(photo):
    answers = [(WIRE / f"{name}.sse").read_bytes() for name in STREAMS]
    async with canned(*(STREAM_HEAD + in_chunks(data) for data in answers)) as (client, _):
        for name, (whole, beside) in STREAMS.items():
            stream = await CALLS[skill_of(name)](client, photo)
            assert await stream.text() == whole
            assert stream.completed
            assert {name: getattr(stream, name) for name in beside} == beside


@pytest.mark.parametrize(("status", "stream"), [("200 OK", True), ("503 Busy", False)])
async def test_error_is_read_as_documented(photo, status, stream):
    """Station's, and an engine's."""
    refusal = {"error": "Queue is full", "status": "rejected"}
    async with canned(whole(refusal, status=status), max_retries=0) as (client, _):
        with pytest.raises(md.ServerError, match=r"^Queue is full$") as caught:
            await client.query(photo, QUESTION, stream=stream)
    assert (caught.value.status, caught.value.body) == (int(status[:3]), refusal)


async def test_engine_that_cannot_think_in_a_stream_is_asked_without_one(photo):
    """Kestrel's words for it."""
    refusal = {"error": "Streaming is not supported when reasoning is enabled"}
    answer = {"answer": "Two.", "reasoning": {"text": "I count."}, "request_id": "42"}
    async with canned(whole(refusal, status="400 Bad Request"), whole(answer)) as (client, server):
        stream = await client.query(photo, QUESTION, stream=True, reasoning=True)
        assert [piece async for piece in stream] == ["Two."]
        assert [request.wants_stream for request in server.requests] == [True, False]
    assert stream.reasoning.text == "I count."
