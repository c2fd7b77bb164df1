"""Everything that is known of the wire from outside, as a test each; the ids say from where.

``docs`` is m87-labs/md-docs at the commit named, ``sdk`` the package moondream 2.6.1,
``station`` the package moondream-station 0.1.9, ``kestrel`` the HTTP server that
m87-labs/kestrel carried from 2025-10 to 2026-03, ``old`` the server of moondream 0.0.6,
``seen`` what users of the live cloud have published. Texts and numbers are ours where
the source has none that are short.
"""

import base64
import json
from pathlib import Path

import pytest
from canned import canned
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md

QUESTION = "How many people?"
GROUNDED = {
    "text": "Two people stand there.",
    "grounding": [{"start_idx": 0, "end_idx": 10, "points": [[0.25, 0.5], [0.75, 0.5]]}],
}
REASONING = md.Reasoning(
    "Two people stand there.", (md.Grounding(0, 10, [[0.25, 0.5], [0.75, 0.5]]),)
)
METRICS = {
    "input_tokens": 735,
    "output_tokens": 45,
    "prefill_time_ms": 20.1,
    "decode_time_ms": 30.5,
    "ttft_ms": 21.0,
}
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
REGION = md.Region(0.1, 0.2, 0.5, 0.6)
USAGE = md.Usage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
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


STREAMED_REQUESTS = {
    "sdk caption": (caption, {}),
    "sdk query": (query, {}),
    "sdk segment": (segment, {}),
    "docs@16a19f4 openai.md": (chat, {"stream_options": {"include_usage": True}}),
}


@pytest.mark.parametrize(("call", "more"), STREAMED_REQUESTS.values(), ids=STREAMED_REQUESTS)
async def test_streamed_request_is_as_documented(photo, call, more):
    async with canned(STREAM_HEAD + in_chunks(b"data: [DONE]\n\n")) as (client, server):
        await (await call(client, photo, stream=True)).text()
        (request,) = server.requests
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["accept-encoding"] == "identity"
    assert request.json.items() >= {"stream": True, **more}.items()


# -- plain answers --------------------------------------------------------------------

STATION_STATS = {"tokens": 2, "duration": 0.5, "tokens_per_sec": 4.0}
REQUEST_ID = "2025-03-25_caption_2025-03-25-21:00:39-715d03"
SAID_BY_CLOUD = {"request_id": REQUEST_ID, "metrics": METRICS, "finish_reason": "stop"}
GREETING = {"role": "assistant", "content": "Hi."}
DETAILS = {"grounding": GROUNDED["grounding"]}
THOUGHT_OF = {"reasoning": GROUNDED["text"], "reasoning_details": DETAILS}

# The body, and of it what is read as something else than what it says.
ANSWERS = {
    "docs@2a396f8 skills/caption.md": (caption, {"caption": "A scene.", **SAID_BY_CLOUD}, {}),
    "docs@2a396f8 skills/query.md": (query, {"answer": "Two.", "request_id": REQUEST_ID}, {}),
    "docs@2a396f8 skills/query.md, reasoning": (
        query,
        {"answer": "Two.", "reasoning": GROUNDED, "request_id": "r"},
        {"reasoning": REASONING},
    ),
    "kestrel query": (
        query,
        {"request_id": "42", "finish_reason": "length", "answer": "Two", "metrics": METRICS},
        {},
    ),
    "station caption": (
        caption,
        {"caption": "A scene.", "_stats": STATION_STATS},
        {"metrics": STATION_STATS, "request_id": None},
    ),
    "old caption": (caption, {"caption": "A scene."}, {"metrics": None}),
    "docs@2a396f8 skills/detect.md": (
        detect,
        {"request_id": "r", "objects": [BOX, {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]},
        {"objects": [REGION, md.Region(0, 0, 1, 1)]},
    ),
    "docs@2a396f8 skills/point.md": (
        point,
        {"request_id": "r", "points": [{"x": 0.25, "y": 0.5}]},
        {"points": [md.Point(0.25, 0.5)]},
    ),
    "station point": (
        point,
        {"points": [{"x": 0.25, "y": 0.5}], "count": 1},
        {"points": [md.Point(0.25, 0.5)]},
    ),
    "docs@2a396f8 skills/segment.md": (
        segment,
        {"path": "M 0 0.5 L 1 1 Z", "bbox": BOX, "request_id": "r"},
        {"bbox": REGION, "transform": "translate(0.1 0.2) scale(0.4 0.4)"},
    ),
    "kestrel segment, no box": (
        segment,
        {"path": "", "bbox": None, "parse_error": "no box", "finish_reason": "stop"},
        {"transform": None},
    ),
    "kestrel segment, return_base64": (
        segment,
        {
            "path": "M 0 0 Z",
            "bbox": BOX,
            "coarse_path": "M 0 0",
            "coarse_mask_base64": "AA==",
            "refined_mask_base64": "AA==",
        },
        {"bbox": REGION},
    ),
    "docs@16a19f4 openai.md": (
        chat,
        {
            "id": "c-1",
            "object": "chat.completion",
            "choices": [
                {
                    "index": 0,
                    "message": {**GREETING, "reasoning": "A greeting."},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        },
        {
            "message": md.ChatMessage(**GREETING, reasoning="A greeting."),
            "reasoning": md.Reasoning("A greeting."),
            "finish_reason": "stop",
            "request_id": "c-1",
            "usage": USAGE,
        },
    ),
    "sdk chat, reasoning_details": (
        chat,
        {"choices": [{"message": {**GREETING, **THOUGHT_OF}}]},
        {"reasoning": REASONING, "finish_reason": None, "usage": None},
    ),
}


@pytest.mark.parametrize(("call", "body", "read"), ANSWERS.values(), ids=ANSWERS)
async def test_answer_is_read_as_documented(photo, call, body, read):
    async with canned(whole(body)) as (client, _):
        result = await call(client, photo)
    said = {name: value for name, value in body.items() if name in type(result).fields()} | read
    assert {name: getattr(result, name) for name in said} == said
    assert result.raw == body


@pytest.mark.parametrize("source", ["docs@2a396f8 skills/query.md, reasoning", "kestrel query"])
async def test_answer_in_place_of_a_stream_is_read_alike(photo, source):
    call, body, read = ANSWERS[source]
    async with canned(whole(body)) as (client, _):
        stream = await call(client, photo, stream=True)
        assert [piece async for piece in stream] == [body["answer"]]
    assert stream.request_id == body["request_id"]
    assert stream.reasoning == read.get("reasoning")


STATS = {
    "workers": 1,
    "queue_size": 0,
    "max_queue_size": 10,
    "processing": 0,
    "timeouts": 0,
    "default_timeout": 30.0,
    "model": "md3",
    "status": "running",
    "requests_processed": 0,
}
HEALTHY = {"status": "ok", "server": "moondream-station"}
STOPPED = {"status": "stopped", "requests_processed": 3, "mine": [1]}
ABOUT = {
    "seen models": (
        lambda client: client.models(),
        {"object": "list", "data": [{"id": "moondream3-preview"}]},
        [md.Model(id="moondream3-preview")],
    ),
    "station models": (
        lambda client: client.models(),
        {"models": [{"id": "md3", "name": "MD3", "description": "a model", "version": "1.0"}]},
        [md.Model(id="md3", name="MD3", description="a model", version="1.0")],
    ),
    "station health": (
        lambda client: client.health(),
        HEALTHY,
        md.Health(ok=True, status="ok", raw=HEALTHY),
    ),
    "station stats": (
        lambda client: client.server_stats(),
        STATS,
        md.ServerStats(**STATS, raw=STATS),
    ),
    "station stats, stopped": (
        lambda client: client.server_stats(),
        STOPPED,
        md.ServerStats(status="stopped", requests_processed=3, raw=STOPPED),
    ),
}


@pytest.mark.parametrize(("call", "body", "value"), ABOUT.values(), ids=ABOUT)
async def test_what_a_server_tells_of_itself_is_read_as_documented(call, body, value):
    async with canned(whole(body)) as (client, _):
        assert await call(client) == value


async def test_starting_engine_is_told_from_a_ready_one():
    """Kestrel has ``/healthz`` and no ``/health``."""
    gone = whole(b"Not Found", status="404 Not Found", kind="text/plain")
    starting = whole({"status": "starting"}, status="503 Service Unavailable")
    async with canned(gone, starting, gone, whole({"status": "ok"})) as (client, _):
        expected = md.Health(ok=False, status="starting", raw={"status": "starting"})
        assert await client.health() == expected
        assert (await client.health()).ok


# -- streams: `documented/*.sse` has them as they are printed or were sent, with the source ----

DOCUMENTED = Path(__file__).parent / "documented"

STREAMS = {
    "cloud_caption": (caption, ["A scene "], {"request_id": "2025-03-25_caption_123456"}),
    "demo_caption": (caption, ["The", " sea"], {}),
    "kestrel_query": (
        query,
        ["A b c", " d e"],
        {"request_id": "42", "finish_reason": "stop", "metrics": METRICS},
    ),
    "kestrel_caption_in_one": (caption, ["A b c"], {"request_id": "42"}),
    "kestrel_reasoning": (query, ["Two."], {"reasoning": REASONING}),
    "station_caption": (
        caption,
        ["A"],
        {"metrics": {"tokens": 3, "duration": 0.0, "tokens_per_sec": 3393.4}, "request_id": None},
    ),
    "station_caption_empty": (caption, [], {}),
    "old_caption": (caption, ["A"], {}),
    "cloud_segment": (
        segment,
        ["M 0"],
        {"path": "M 0 0.5 L 1 1 Z", "bbox": REGION, "parse_error": "x", "request_id": "42"},
    ),
    "kestrel_segment_no_box": (segment, ["M 0"], {"path": "M 0 0 Z", "bbox": None}),
    "cloud_chat": (
        chat,
        ["Hi"],
        {"request_id": "c-1", "usage": USAGE},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
async def test_stream_is_read_as_documented(photo, name):
    call, pieces, known = STREAMS[name]
    data = (DOCUMENTED / f"{name}.sse").read_bytes()
    async with canned(STREAM_HEAD + in_chunks(data)) as (client, _):
        stream = await call(client, photo, stream=True)
        assert [piece async for piece in stream.chunk] == pieces
    assert stream.completed
    assert {name: getattr(stream, name) for name in known} == known


async def test_engine_that_cannot_think_in_a_stream_is_asked_without_one(photo):
    """Kestrel's words for it."""
    refusal = {"error": "Streaming is not supported when reasoning is enabled"}
    answer = {"answer": "Two.", "reasoning": GROUNDED, "request_id": "42"}
    async with canned(whole(refusal, status="400 Bad Request"), whole(answer)) as (client, server):
        stream = await client.query(photo, QUESTION, stream=True, reasoning=True)
        assert [piece async for piece in stream] == ["Two."]
        assert [request.wants_stream for request in server.requests] == [True, False]
    assert stream.reasoning == REASONING
