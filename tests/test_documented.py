"""Everything that is known of the wire from outside, as a test each; the ids say from where.

``docs`` is m87-labs/md-docs at the commit named, ``sdk`` the package moondream 2.6.1,
``station`` the package moondream-station 0.1.9, ``kestrel`` the HTTP server that
m87-labs/kestrel carried from 2025-10 to 2026-03, ``old`` the server of moondream 0.0.6,
``seen`` what users of the live cloud have published. Texts and numbers are ours where
the source has none that are short.
"""

import base64
import json

import pytest
from canned import canned
from raw_server import STREAM_HEAD, in_chunks, whole
from test_events import STREAMS, WIRE, skill_of

import moondream_async as md

QUESTION = "How many people?"
HELLO = [{"role": "user", "content": "Hello"}]


def caption(client, photo, **options):
    return client.caption(photo, **options)


def query(client, photo, **options):
    return client.query(photo, QUESTION, **options)


def detect(client, photo, **options):
    return client.detect(photo, "person", **options)


def point(client, photo, **options):
    return client.point(photo, "person", **options)


def segment(client, photo, **options):
    return client.segment(photo, "person", **options)


def chat(client, photo, **options):
    return client.chat(HELLO, **options)


# -- requests -------------------------------------------------------------------------

PHOTO = "<the picture as a data URL>"
SAMPLING = {"temperature": 0.5, "top_p": 0.3, "max_tokens": 512}
FINETUNE = "moondream3.1-9B-A2B/01ABC@100"

ASKED = {"image_url": PHOTO, "question": QUESTION, "stream": False}
SOUGHT = {"image_url": PHOTO, "object": "person"}
REFS = [[0.5, 0.25], [0.1, 0.2, 0.5, 0.6]]


def shown(image):
    """What a message about a picture says."""
    image_part = {"type": "image_url", "image_url": {"url": image}}
    return [{"role": "user", "content": [{"type": "text", "text": QUESTION}, image_part]}]


REQUESTS = {
    "docs@2a396f8 skills/caption.md": (
        lambda client, photo: client.caption(photo, length="short", model="moondream3-preview"),
        "/v1/caption",
        {"image_url": PHOTO, "length": "short", "stream": False, "model": "moondream3-preview"},
    ),
    "sdk caption": (
        lambda client, photo: client.caption(photo, settings=SAMPLING),
        "/v1/caption",
        {"image_url": PHOTO, "length": "normal", "stream": False, "settings": SAMPLING},
    ),
    "docs@2a396f8 skills/query.md": (
        lambda client, photo: query(client, photo, reasoning=True, model=FINETUNE),
        "/v1/query",
        ASKED | {"reasoning": True, "model": FINETUNE},
    ),
    "sdk query, without a picture": (
        lambda client, photo: client.query(question=QUESTION, settings=SAMPLING),
        "/v1/query",
        {"question": QUESTION, "stream": False, "settings": SAMPLING},
    ),
    "sdk query, spatial_refs": (
        lambda client, photo: query(client, photo, spatial_refs=REFS),
        "/v1/query",
        ASKED | {"spatial_refs": REFS},
    ),
    "docs@2a396f8 skills/detect.md": (
        lambda client, photo: detect(client, photo, settings={"max_objects": 50}),
        "/v1/detect",
        SOUGHT | {"settings": {"max_objects": 50}},
    ),
    "docs@2a396f8 skills/point.md": (point, "/v1/point", SOUGHT),
    "sdk point, spatial_refs": (
        lambda client, photo: point(client, photo, spatial_refs=REFS[:1]),
        "/v1/point",
        SOUGHT | {"spatial_refs": REFS[:1]},
    ),
    "docs@2a396f8 skills/segment.md": (
        lambda client, photo: segment(client, photo, spatial_refs=REFS[:1]),
        "/v1/segment",
        SOUGHT | {"stream": False, "spatial_refs": REFS[:1]},
    ),
    "docs@16a19f4 openai.md": (
        lambda client, photo: client.chat(
            shown(photo),
            reasoning=False,
            settings={"temperature": 0, "top_p": 0.9, "max_tokens": 4096},
        ),
        "/v1/chat/completions",
        {
            "model": "moondream3-preview",
            "messages": shown(PHOTO),
            "stream": False,
            "reasoning": False,
            "temperature": 0,
            "top_p": 0.9,
            "max_completion_tokens": 4096,
        },
    ),
    "sdk chat": (
        chat,
        "/v1/chat/completions",
        {"model": "moondream3-preview", "messages": HELLO, "stream": False},
    ),
}


@pytest.mark.parametrize(("call", "path", "body"), REQUESTS.values(), ids=REQUESTS)
async def test_request_is_as_documented(photo, call, path, body):
    texts = dict.fromkeys(("caption", "answer", "path"), "")
    answer = {**texts, "objects": [], "points": [], "choices": [{"message": {"content": ""}}]}
    async with canned(whole(answer)) as (client, server):
        await call(client, photo)
        (request,) = server.requests
    url = f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"
    assert (request.method, request.target) == ("POST", path)
    assert request.headers["content-type"] == "application/json"  # and nothing else: old
    assert request.headers["user-agent"].startswith("moondream-async/")  # must be there: seen
    assert int(request.headers["content-length"]) == len(request.body)
    assert json.loads(request.body.replace(url.encode(), PHOTO.encode())) == body


# -- answers: `test_answers.py` and `test_events.py` have them all, without a socket ------------


async def test_starting_engine_is_told_from_a_ready_one():
    """Kestrel has ``/healthz`` and no ``/health``."""
    gone = whole(b"Not Found", status="404 Not Found", kind="text/plain")
    starting = whole({"status": "starting"}, status="503 Service Unavailable")
    async with canned(gone, starting, gone, whole({"status": "ok"})) as (client, _):
        expected = md.Health(ok=False, status="starting", raw={"status": "starting"})
        assert await client.health() == expected
        assert (await client.health()).ok


CALLS = {"caption": caption, "query": query, "segment": segment, "chat": chat}


@pytest.mark.parametrize(("name", "whole", "beside"), STREAMS, ids=[name for name, *_ in STREAMS])
async def test_stream_is_read_as_documented(photo, name, whole, beside):
    data = (WIRE / f"{name}.sse").read_bytes()
    async with canned(STREAM_HEAD + in_chunks(data)) as (client, _):
        stream = await CALLS[skill_of(name)](client, photo, stream=True)
        assert await stream.text() == whole
    assert stream.completed
    assert {name: getattr(stream, name) for name in beside} == beside


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("status", ["200 OK", "503 Busy"])  # Station's, and an engine's
async def test_error_is_read_as_documented(photo, status, stream):
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
