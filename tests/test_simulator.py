"""The simulator, spoken to over real sockets with plain aiohttp."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import re
import socket
import ssl
from unittest.mock import ANY
from urllib.parse import urlsplit

import aiohttp
import pytest
import trustme
from aiohttp.test_utils import TestServer
from PIL import Image, ImageDraw
from spoken import SAMPLE, get, post, speak, stream

from moondream_async.simulator import (
    DIALECTS,
    Fault,
    FaultQueue,
    Simulator,
    describe_faults,
)
from moondream_async.simulator.faults import EFFECTS


def data_url(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw(*shapes, size=(320, 240), ground="white"):
    """Draw rectangles, each a colour and a box in pixels."""
    image = Image.new("RGB", size, ground)
    for colour, box in shapes:
        ImageDraw.Draw(image).rectangle(box, fill=colour)
    return data_url(image)


CAPTION = {"image_url": SAMPLE}
QUERY = {"image_url": SAMPLE, "question": "What is in this image?"}
STREAM = {**QUERY, "stream": True, "settings": {"max_tokens": 5}}
WORDS = ["A", " bright", " 640\N{MULTIPLICATION SIGN}480", " JPEG", " picture,"]


async def ask(path, body, dialect="cloud", **options):
    """Ask a simulator that is there for this alone."""
    async with Simulator(dialect, **options) as simulator:
        return await post(simulator, path, body)


# The wire


STREAMED = {
    "cloud": [
        *({"chunk": word, "completed": False, "request_id": ANY} for word in WORDS),
        {"chunk": "", "completed": True, "request_id": ANY, "org_id": ANY},
    ],
    "kestrel": [
        {"chunk": "".join(WORDS[:3]), "completed": False, "token_index": 2},
        {
            "chunk": "".join(WORDS[3:]),
            "completed": True,
            "answer": "".join(WORDS),
            "request_id": "1",
            "finish_reason": "length",
            "metrics": {
                **dict.fromkeys(("input_tokens", "prefill_time_ms", "decode_time_ms"), ANY),
                "ttft_ms": ANY,
                "output_tokens": 5,
            },
        },
    ],
    "station": [
        *({"chunk": word} for word in WORDS),
        {"stats": dict.fromkeys(("tokens", "duration", "tokens_per_sec"), ANY)},
        {"completed": True},
    ],
    "old": [
        *({"chunk": word, "completed": False} for word in WORDS),
        {"chunk": "", "completed": True},
    ],
}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_events_of_a_stream_are_those_of_its_server(dialect):
    async with Simulator(dialect) as simulator:
        answer = await post(simulator, "/query", STREAM)
        assert (simulator.endpoint == simulator.origin) == (dialect == "old")  # which has no /v1
    assert (answer.events, answer.whole) == (STREAMED[dialect], True)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    if dialect == "cloud":
        (request_id,) = {event["request_id"] for event in answer.events}
        moment = r"\d{4}-\d\d-\d\d-\d\d:\d\d:\d\d"
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d_query_{moment}-[0-9a-f]{{6}}", request_id)
        assert "\N{MULTIPLICATION SIGN}".encode() in answer.data, "not escaped, but UTF-8"
    if dialect == "old":
        assert answer.headers["Connection"] == "close"
        assert not {"Transfer-Encoding", "Content-Length"} & answer.headers.keys()


@pytest.mark.parametrize("rounds", range(0, 6, 2))
async def test_connection_that_comes_at_the_end_is_closed(rounds):
    """Where it is not, a warning that is an error says so."""
    async with Simulator() as simulator:
        address = urlsplit(simulator.endpoint)
        # This blocks the event loop, so that the server has not accepted it yet.
        peer = socket.create_connection((address.hostname, address.port), timeout=60)
        for _ in range(rounds):
            await asyncio.sleep(0)
    with peer:
        assert peer.recv(1) == b""
    gc.collect()


async def test_blank_lines_between_events_can_be_left_out():
    lines = (await ask("/query", STREAM, blank_lines=False)).data.splitlines()
    assert len(lines) == 6
    assert all(json.loads(line.removeprefix(b"data: ")) for line in lines)


MEASURED = {"answer", "request_id", "finish_reason", "metrics"}
KEYS = {"cloud": MEASURED, "kestrel": MEASURED, "station": {"answer", "_stats"}, "old": {"answer"}}


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_plain_answer_is_the_streamed_one_with_the_keys_of_its_server(dialect):
    async with Simulator(dialect) as simulator:
        caption = (await stream(simulator, "/caption", QUERY)).text
        assert (await post(simulator, "/caption", QUERY)).json["caption"] == caption
        answer = (await stream(simulator, "/query", QUERY)).text
        whole, again = [(await post(simulator, "/query", QUERY)).json for _ in "12"]
        cut = await post(simulator, "/query", STREAM | {"stream": False})
    assert whole["answer"] == again["answer"] == answer
    assert (cut.status, {*cut.json}) == (200, KEYS[dialect])
    assert cut.headers["Content-Type"] == "application/json"
    assert cut.json["answer"] == "".join(WORDS) < answer
    if KEYS[dialect] is MEASURED:
        assert (cut.json["finish_reason"], whole["finish_reason"]) == ("length", "stop")
        assert cut.json["metrics"]["output_tokens"] == 5


async def test_reasoning_is_grounded_in_places_of_the_picture(simulator):
    reasoning = (await post(simulator, "/query", {**QUERY, "reasoning": True})).json["reasoning"]
    spans = {
        reasoning["text"][span["start_idx"] : span["end_idx"]]: span["points"]
        for span in reasoning["grounding"]
    }
    ((x, y),) = spans["a red area"]
    assert (x, y) == pytest.approx((140 / 640, 260 / 480), abs=0.01)
    streamed = await stream(simulator, "/query", {**QUERY, "reasoning": True})
    assert streamed.events[-1]["reasoning"] == reasoning


async def test_kestrel_refuses_reasoning_in_a_stream():
    answer = await ask("/query", {**QUERY, "reasoning": True, "stream": True}, "kestrel")
    assert answer.status == 400
    assert answer.json == {"error": "Streaming is not supported when reasoning is enabled"}


@pytest.mark.parametrize(
    ("dialect", "more", "model"),
    [
        ("cloud", {}, {"id": "moondream3-preview"}),
        ("kestrel", {}, None),
        (
            "station",
            {"server": "moondream-station"},
            dict.fromkeys(("description", "version"), ANY),
        ),
    ],
)
async def test_health_and_models_have_the_shape_of_their_server(dialect, more, model):
    async with Simulator(dialect) as simulator:
        for path in ("/health", "/healthz"):
            health = await get(simulator, simulator.origin + path)
            assert health.json == {"status": "ok", **more}
        if model:
            models = (await get(simulator, "/models")).json
            assert any(
                model.items() <= each.items() for each in models.get("data") or models["models"]
            )
            assert models.get("object") == ("list" if dialect == "cloud" else None)


# Answers come from pixels

RED_LEFT = draw(("red", (20, 80, 100, 160)))
TWO_BLUE = draw(("blue", (20, 20, 80, 80)), ("blue", (200, 120, 300, 220)), ground="black")


ANSWERS = {
    RED_LEFT: {
        "What colours are there?": r"white \(\d\d%\) and red \(\d%\)",
        "Where is the red thing?": r"A red area lies at the left",
        "Where is the blue thing?": r"No, I measure no blue area",
        "Is there a red ball?": r"Yes\. A red area",
        "Is it white?": r"Yes, white covers most",
        "How many red balls?": r"There is 1 red area",
        "How large is it?": "320\N{MULTIPLICATION SIGN}240 PNG",
        "Where is the darkest part?": r"at the (bottom )?left",
        "How bright is it?": r"bright: its mean brightness is 0\.9",
    },
    TWO_BLUE: {
        "How many blue squares?": r"There are 2 blue areas",
        "How many things?": r"There are 2 coloured areas",
        "How bright is it?": r"dark: its mean brightness is 0\.0",
        "Where is the brightest part?": r"at the \w+",
        "What color is the background?": r"black \(\d\d%\) and blue",
        "Who painted this?": r"mostly black, with blue.*no model has looked",
    },
    None: {"Why?": "^No picture came with this question"},
}


@pytest.mark.parametrize("image", ANSWERS, ids=["red at the left", "two blue", "no picture"])
async def test_answers_are_measured_in_the_picture(simulator, image):
    for question, expected in ANSWERS[image].items():
        body = {"question": question} | ({"image_url": image} if image else {})
        answer = (await post(simulator, "/query", body)).json["answer"]
        assert re.search(expected, answer), question


async def test_spatial_refs_are_looked_at():
    places = [[0.2, 0.5], [0.5, 0.4, 0.9, 0.6]]
    body = {"image_url": RED_LEFT, "question": "What colours?", "spatial_refs": places}
    answer = (await ask("/query", body)).json["answer"]
    assert answer.startswith("At (0.20, 0.50) it is red. At (0.70, 0.50) it is white.")


async def test_captions_grow_with_their_length_and_bare_base64_is_a_picture_too(simulator):
    short, normal, long, bare = [
        (await post(simulator, "/caption", body)).json["caption"]
        for body in (
            *(CAPTION | {"length": length} for length in ("short", "normal", "long")),
            {"image_url": SAMPLE.partition(",")[2]},
        )
    ]
    assert len(short) < len(normal) < len(long)
    assert normal.startswith(short)
    assert bare == normal


@pytest.mark.parametrize(
    ("kind", "size"),
    [("JPEG", (2000, 1500)), ("PNG", (1, 1)), ("GIF", (3, 700)), ("WEBP", (900, 3))],
)
async def test_any_format_and_size_is_measured(kind, size):
    image = data_url(Image.new("RGB", size, (0, 0, 255)), kind)
    answer = await ask("/caption", {"image_url": image, "length": "short"})
    size_and_kind = f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]} {kind}"
    assert answer.json["caption"] == f"A dark {size_and_kind} picture, blue all over."


# Objects

SQUARES = draw(
    ("red", (32, 24, 95, 71)), ("red", (160, 120, 287, 215)), ("blue", (192, 24, 255, 71))
)
LARGE_RED = {"x_min": 0.5, "y_min": 0.5, "x_max": 0.9, "y_max": 0.9}
SMALL_RED = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.3, "y_max": 0.3}
BLUE = {"x_min": 0.6, "y_min": 0.1, "x_max": 0.8, "y_max": 0.3}
RED_SQUARE = {"image_url": SQUARES, "object": "red square"}


def near(box):
    return pytest.approx(box, abs=0.015)


@pytest.mark.parametrize(
    ("object", "more", "boxes"),
    [
        ("red square", {}, [LARGE_RED, SMALL_RED]),
        ("red square", {"settings": {"max_objects": 1}}, [LARGE_RED]),
        ("red square", {"spatial_refs": [[0.2, 0.2]]}, [SMALL_RED]),
        ("shapes", {}, [LARGE_RED, SMALL_RED, BLUE]),
        ("green square", {}, []),
        ("person", {}, []),
        ("white wall", {}, [{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]),
    ],
    ids=str,
)
async def test_detect_boxes_the_areas_of_what_is_named(object, more, boxes):
    answer = (await ask("/detect", {"image_url": SQUARES, "object": object, **more})).json
    assert answer["objects"] == [near(box) for box in boxes]
    assert answer.keys() == {"objects", "request_id", "finish_reason", "metrics"}


@pytest.mark.parametrize("dialect", ["cloud", "kestrel"])
async def test_segment_streams_a_box_then_a_coarse_path_then_the_refined_one(dialect):
    body = {"image_url": SAMPLE, "object": "red circle"}
    plain = (await ask("/segment", body, dialect)).json
    answer = await ask("/segment", {**body, "stream": True}, dialect)
    box, *deltas, final = answer.events
    assert box == {"type": "bbox", "bbox": plain["bbox"]}
    assert deltas == [
        {"type": "path_delta", "chunk": chunk, "completed": False, "token_index": number}
        for number, chunk in enumerate(answer.chunks)
    ]
    assert re.fullmatch("M .* Z", answer.text)
    assert len(answer.text) < len(final["path"])
    assert (final["type"], final["chunk"], final["completed"]) == ("final", "", True)
    assert (final["path"], final["bbox"]) == (plain["path"], plain["bbox"])
    assert {"request_id", "finish_reason", "metrics"} <= final.keys()


# Chat

CHAT = "/chat/completions"


def show(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def say(text, role="user"):
    return {"role": role, "content": text}


def shown_by(role):
    return show("x", RED_LEFT) | {"role": role}


async def test_chat_answers_the_last_question_about_the_last_picture():
    messages = [
        say("Be brief.", "system"),
        show("How many blue squares?", TWO_BLUE),
        say("There are 2.", "assistant"),
        show("Look at this.", RED_LEFT),
        say("It is red.", "assistant"),
        say("How many red squares?"),
    ]
    answer = await ask(CHAT, {"messages": messages})
    body = answer.json
    assert (answer.status, body["object"]) == (200, "chat.completion")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "There is 1 red area."},
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens"] > 2 * 729
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 5


async def test_chat_answers_about_each_of_several_pictures():
    message = show("How many blue squares?", TWO_BLUE, RED_LEFT)
    answer = await ask(CHAT, {"messages": [message]})
    assert answer.json["choices"][0]["message"]["content"] == (
        "Picture 1: There are 2 blue areas. Picture 2: There are 0 blue areas."
    )


async def test_chat_streams_reasoning_then_the_answer_then_usage_then_done():
    body = {"messages": [show("How many red squares?", RED_LEFT)], "reasoning": True}
    plain = (await ask(CHAT, body)).json
    answer = await ask(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.data.endswith(b"data: [DONE]\n\n")
    *chunks, end, usage = answer.events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0].pop("role") == "assistant"
    keys = ["".join(delta) for delta in deltas]
    assert keys == ["reasoning"] * keys.count("reasoning") + ["content"] * keys.count("content")
    message = plain["choices"][0]["message"]
    for key in ("reasoning", "content"):
        assert "".join(delta.get(key, "") for delta in deltas) == message[key]
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert (usage["choices"], usage["usage"]) == ([], plain["usage"])
    assert {chunk["object"] for chunk in (*chunks, end, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (*chunks, end, usage)}) == 1


async def test_chat_sends_usage_in_a_stream_only_when_asked():
    body = {"messages": [say("Hello")], "stream": True, "max_completion_tokens": 2}
    events = (await ask(CHAT, body)).events
    contents = [event["choices"][0]["delta"].get("content") for event in events]
    assert contents == ["No", " picture", None]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in event for event in events)


# Batches


@pytest.fixture
async def upload(simulator):
    """Speaks of an upload of one part: with a method, a query, and a body."""
    made = (await post(simulator, "/batch?action=mpu-create")).json

    async def ask(method, query, **body):
        place = f"/batch/{made['fileId']}?uploadId={made['uploadId']}&{query}"
        return await speak(simulator, method, place, **body)

    ask.part = (await ask("PUT", "action=mpu-uploadpart&partNumber=1", data=b"{}")).json
    return ask


async def test_batch_part_over_the_limit_is_refused(simulator, upload):
    async def endless():
        while True:
            yield bytes(1024 * 1024)

    answer = await upload("PUT", "action=mpu-uploadpart&partNumber=1", data=endless())
    assert answer.status == simulator.requests[-1].status == 413


@pytest.mark.parametrize(
    ("query", "part", "message"),
    [
        ("action=mpu-complete", {"partNumber": 2}, "Part 2 is missing"),
        ("action=mpu-complete", {"etag": '"another"'}, "its etag differs"),
        ("action=mpu-finish", {}, "action must be mpu-complete"),
        ("action=mpu-complete&uploadId=upload-9", {}, None),
    ],
    ids=["part", "etag", "action", "right"],
)
async def test_only_parts_that_came_complete_a_batch(upload, query, part, message):
    answer = await upload("POST", query, json={"parts": [upload.part | part]})
    assert answer.status == (200 if message is None else 400)
    assert message is None or message in answer.message


async def test_results_are_only_for_who_has_their_signature_and_no_key(simulator, upload):
    await upload("POST", "action=mpu-complete", json={"parts": [upload.part]})
    place = f"/batch/{simulator.requests[-1].params['id']}"
    while not (outputs := (await get(simulator, place)).json.get("outputs")):
        pass
    url = outputs[0]["url"]
    key = {"X-Moondream-Auth": "a key"}
    answers = [await get(simulator, url), await get(simulator, url[:-1])]
    answers.append(await get(simulator, url, headers=key))
    assert [answer.status for answer in answers] == [200, 403, 400]


async def test_numbers_that_python_does_not_read_are_refused(simulator, upload):
    made = (await post(simulator, "/tuning/finetunes", {"name": "mine", "rank": 8})).json
    long = "9" * 5000
    checkpoint = f"/tuning/finetunes/{made['finetune_id']}/checkpoints/{long}"
    answers = [
        await upload("PUT", f"action=mpu-uploadpart&partNumber={long}"),
        await get(simulator, f"/batch?limit={long}"),
        await speak(simulator, "DELETE", checkpoint),
    ]
    assert [answer.status for answer in answers] == [400, 400, 404]


# Tuning


async def roll_out(request, num_rollouts, **more):
    """Ask a finetune that is there for this alone."""
    async with Simulator() as simulator:
        made = await post(simulator, "/tuning/finetunes", {"name": "mine", "rank": 8})
        body = {"finetune_id": made.json["finetune_id"], "num_rollouts": num_rollouts}
        return await post(simulator, "/tuning/rollouts", {**body, "request": request, **more})


@pytest.mark.parametrize(
    ("skill", "truth"),
    [
        ("detect", {"boxes": [LARGE_RED, SMALL_RED]}),
        ("point", {"points": [{"x": 0.7, "y": 0.7}, {"x": 0.2, "y": 0.2}]}),
        ("point", {"boxes": [LARGE_RED, SMALL_RED]}),
    ],
    ids=["detect", "point", "point-in-box"],
)
async def test_rollouts_are_rewarded_by_the_ground_truth(skill, truth):
    request = {"skill": skill, "object": "red", "image_url": SQUARES}
    answer = (await roll_out(request, 16, ground_truth=truth)).json
    rewards = answer["rewards"]
    assert answer["request"] == request
    assert len(answer["rollouts"]) == len(rewards) == 16
    assert rewards[0] > 0.9
    assert rewards == sorted(rewards, reverse=True), "each is a little worse"
    assert rewards[-1] <= 0.5
    first = answer["rollouts"][0]
    assert first["output"].items() <= (await ask(f"/{skill}", request)).json.items()
    assert first.keys() >= {"skill", "finish_reason", "answer_tokens", "thinking_tokens", "coords"}


@pytest.mark.parametrize(("temperature", "kinds"), [(1.0, 3), (0, 1)])
async def test_query_rollouts_differ_unless_the_temperature_is_zero(temperature, kinds):
    request = {**QUERY, "skill": "query", "settings": {"temperature": temperature}}
    answer = (await roll_out(request, 3)).json
    assert answer["rewards"] is None
    assert len({rollout["output"]["answer"] for rollout in answer["rollouts"]}) == kinds


async def test_rollouts_of_a_question_earn_nothing_by_points():
    truth = {"points": [{"x": 0, "y": 0}]}
    answer = await roll_out({**QUERY, "skill": "query"}, 2, ground_truth=truth)
    assert answer.json["rewards"] == [0, 0]


# Errors

CUT_SAMPLE = SAMPLE.partition(",")[2][:8000]


def settings(**settings):
    return {**CAPTION, "settings": settings}


def refs(*place):
    return {"spatial_refs": [place]}


WRONG = {
    "/query": [
        ([], "Request body must be a JSON object", None),
        ({"image_url": SAMPLE}, "Field 'question' is required", "question"),
        ({"question": "  "}, "'question' must be a non-empty string", "question"),
        ({"question": 1}, "Field 'question' must be a string", "question"),
        ({**QUERY, "stream": "true"}, "Field 'stream' must be a boolean", "stream"),
        ({**QUERY, "reasoning": 1}, "Field 'reasoning' must be a boolean", "reasoning"),
        ({"question": "x", **refs(0, 0)}, "requires an image", "spatial_refs"),
        ({**QUERY, **refs(0, 1, 1, 0)}, "Each of", "spatial_refs"),
        ({**QUERY, **refs(0, 1, 1)}, "Each of", "spatial_refs"),
        ({**QUERY, **refs(0, 2)}, "is invalid", "spatial_refs[0][1]"),
    ],
    "/caption": [
        ({}, "Field 'image_url' is required", "image_url"),
        ({**CAPTION, "length": "huge"}, "Field 'length' is invalid", "length"),
        ({"image_url": "%%%"}, "Invalid base64 image data", "image_url"),
        ({"image_url": "Zm9v"}, "Invalid image data", "image_url"),
        ({"image_url": CUT_SAMPLE}, "Invalid image data", "image_url"),
        ({"image_url": "data:text/plain;base64,Zm9v"}, "must begin with", "image_url"),
        ({"image_url": "https://example.com/a.jpg"}, "remote URLs", "image_url"),
        (settings(temperature=-1), "temperature' is invalid", "settings.temperature"),
        (settings(max_tokens=1.5), "must be an integer", "settings.max_tokens"),
        ({**CAPTION, "settings": 3}, "Field 'settings' must be an object", "settings"),
    ],
    "/detect": [(CAPTION, "Field 'object'", "object")],
    "/point": [(CAPTION | {"object": " "}, "Field 'object'", "object")],
    "/segment": [(CAPTION, "Field 'object'", "object")],
    CHAT: [
        ({}, "Field 'messages' is required", "messages"),
        ({"messages": []}, "Field 'messages' is invalid", "messages"),
        ({"messages": [{"role": "user"}]}, "content' is required", "messages[0].content"),
        ({"messages": [say("x", "tool")]}, "role' is invalid", "messages[0].role"),
        ({"messages": [say("x"), say("y", "system")]}, "must come first", ANY),
        ({"messages": [say("x", "assistant")]}, "must be from the user", ANY),
        ({"messages": [say(" ")]}, "must hold a text", ANY),
        ({"messages": [shown_by("assistant"), say("y")]}, "user messages only", ANY),
        ({"messages": [show("x", "https://example.com/a.jpg")]}, "remote URLs", ANY),
        ({"messages": [say("x")], "max_completion_tokens": 5000}, "max_completion_tokens", ANY),
    ],
}


@pytest.mark.parametrize("path", WRONG)
async def test_wrong_requests_are_refused_in_the_words_of_the_server(simulator, path):
    for body, message, param in WRONG[path]:
        answer = await post(simulator, path, body)
        error = answer.json["error"]
        assert (answer.status, error["param"], error["type"]) == (400, param, "invalid_request")
        assert message in error["message"]


async def test_what_the_engine_itself_refuses_has_its_status():
    answer = await ask(CHAT, {"messages": [say("x", "system")] * 2})
    assert (answer.status, answer.message) == (500, "Only one system message is allowed")
    for request, count in (({"skill": "caption"}, 3), ({**QUERY, "skill": "query"}, 17)):
        assert (await roll_out(request, count)).status == 400
    async with Simulator("kestrel") as simulator:
        answer = await speak(simulator, "POST", "/query", data=b"{")
    assert (answer.status, answer.json) == (400, {"error": "Request body must be valid JSON"})


@pytest.mark.parametrize("megabytes", [11, 20], ids=["picture", "body"])
async def test_too_large_is_refused_with_413(simulator, megabytes):
    image = base64.b64encode(bytes(megabytes * 1024 * 1024)).decode()
    body = io.BytesIO(json.dumps({"image_url": image}).encode())
    answer = await speak(simulator, "POST", "/caption", data=body)
    assert (answer.status, answer.json["error"]["type"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status", "text", "allow"),
    [
        ("POST", "/v1/nothing", 404, b"Not Found", None),
        ("GET", "/v1/caption", 405, b"Method Not Allowed", "POST"),
    ],
)
async def test_unknown_routes_are_plain_text_and_remembered(
    simulator, method, path, status, *, text, allow
):
    answer = await speak(simulator, method, simulator.origin + path)
    assert (answer.status, answer.data, answer.headers.get("Allow")) == (status, text, allow)
    assert answer.headers["Content-Type"].startswith("text/plain")
    (received,) = simulator.requests
    assert (received.path, received.status) == (path, status)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/query", {"error": "Field 'image_url' is required", "status": "error"}),
        ("/segment", {"error": "Function 'segment' not available"}),
    ],
)
async def test_station_answers_errors_with_status_200(path, error):
    answer = await ask(path, {"question": "x"}, "station")
    assert (answer.status, answer.json) == (200, error)


async def test_station_takes_what_it_can_from_a_request():
    async with Simulator("station") as station:
        url = station.origin + "/query"  # without /v1
        merged = {"image_url": SAMPLE, "stream": "false"}
        asked = {"question": "What colours?"}
        answer = await speak(station, "PUT", url, params=asked, json=merged)
        assert answer.headers["Content-Type"].startswith("text/event-stream"), "any text is true"
        assert answer.text.startswith("By area")
        assert "is required" in (await speak(station, "POST", url, data=b"{")).message
        failed = await post(station, url, [])
        assert (failed.status, failed.data) == (500, b"Internal Server Error")


async def test_old_server_wants_exactly_json():
    headers = {"Content-Type": "application/json; charset=utf-8"}
    async with Simulator("old") as simulator:
        answer = await post(simulator, "/query", QUERY, headers=headers)
    assert (answer.status, answer.message) == (400, "Content-Type must be application/json")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/query", {"X-Moondream-Auth": "right"}, 200),
        ("POST", "/query", {"X-Moondream-Auth": "wrong"}, 401),
        ("POST", "/query", {"Authorization": "Bearer right"}, 401),
        ("POST", "/query", {}, 401),
        ("POST", CHAT, {"Authorization": "Bearer right"}, 200),
        ("POST", CHAT, {"X-Moondream-Auth": "right"}, 200),
        ("POST", CHAT, {"Authorization": "Bearer wrong"}, 401),
        ("POST", CHAT, {}, 401),
        ("GET", "/models", {}, 200),
        ("GET", "/models", {"Authorization": "Bearer right"}, 200),
        ("GET", "/models", {"Authorization": "Bearer wrong"}, 401),
        ("GET", "/models", {"User-Agent": "Python-urllib/3.12"}, 403),
    ],
)
async def test_key_is_checked_where_the_cloud_looks_for_it(method, path, headers, status):
    body = QUERY | {"messages": [say("Hello")]}
    async with Simulator(api_key="right") as simulator:
        answer = await speak(simulator, method, path, json=body, headers=headers)
    assert answer.status == status
    if status == 403:
        assert answer.data == b"error code: 1010", "the gateway's"
    elif status == 401 and path == "/models":
        assert answer.json["error"] == "Invalid API key"
    elif status == 401:
        assert answer.json["error"]["type"] == "authentication_error"


# What is remembered


async def test_requests_and_connections_are_remembered(simulator):
    url = simulator.endpoint + "/query"
    async with aiohttp.ClientSession(headers={"X-Key": "1"}) as session:
        for _ in range(2):
            async with session.post(url, json=STREAM) as response:
                await response.read()
        assert simulator.connections.open == 1
    await post(simulator, "/caption", CAPTION)
    await simulator.wait_until(lambda: simulator.connections.open == 0)
    first, second, third = simulator.requests
    assert (first.method, first.path, first.body) == ("POST", "/v1/query", STREAM)
    assert first.headers["x-key"] == "1"
    assert [first.connection, second.connection, third.connection] == [1, 1, 2]
    assert simulator.connections.accepted == 2
    assert (first.stream, first.events_sent, first.disconnected) == (True, 6, False)
    assert first.bytes_sent == second.bytes_sent > 300
    assert first.ended.is_set()
    assert (third.stream, third.status) == (False, 200)
    assert third.bytes_sent > 100


async def test_only_the_latest_requests_are_kept():
    async with Simulator(keep=2) as simulator:
        for question in ("a", "b", "c"):
            await post(simulator, "/query", {"question": question})
        assert [received.body["question"] for received in simulator.requests] == ["b", "c"]


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize(
    ("fault", "rate", "lines", "events"),
    [
        ("endless", 0, 20, None),
        ("endless", 500, 20, None),
        ("stall=3", 0, 6, 3),
        ("stall_inside=3", 0, 4, 2),
        ("stall=2,heartbeats=0.01", 0, 24, 2),
    ],
)
async def test_stream_that_does_not_end_is_ended_by_a_client_that_goes_away(
    session, fault, rate, lines, *, events
):
    async with Simulator(rate=rate, faults=[fault]) as simulator:
        response = await session.post(simulator.endpoint + "/query", json=STREAM)
        read = [await response.content.readline() for _ in range(lines)]
        said = sum(line.startswith(b"data: ") for line in read)
        assert said == (lines // 2 if events is None else events)
        (received,) = simulator.requests
        assert (await post(simulator, "/query", QUERY)).status == 200, "there is room for others"
        assert not received.ended.is_set()
        response.close()
        await received.ended.wait()
        assert received.disconnected
        assert received.ended_at is not None
        assert received.events_sent >= said


async def test_rate_sets_how_long_an_answer_takes_at_least():
    body = {**STREAM, "settings": {"max_tokens": 9}}
    answer = await ask("/query", body, "kestrel", rate=100)
    assert answer.events[-1]["metrics"]["decode_time_ms"] >= 85


async def test_leaving_the_simulator_ends_open_answers(session):
    async with Simulator(faults=["stall=1"]) as simulator:
        response = await session.post(simulator.endpoint + "/query", json=STREAM)
        await response.content.readline()
    (received,) = simulator.requests
    assert received.ended.is_set()
    assert not received.disconnected, "it was the server that left"
    with pytest.raises(aiohttp.ClientError):
        await response.read()
    with pytest.raises(RuntimeError, match="isn't listening"):
        _ = simulator.endpoint


# Other ways to run it


async def test_app_runs_in_a_runner_of_the_users_own(session):
    simulator = Simulator(faults=["endless"])
    async with TestServer(simulator.app) as server:
        response = await session.post(server.make_url("/v1/query"), json=STREAM)
        await response.content.readline()
        response.close()
        await simulator.requests[0].ended.wait()
        assert simulator.requests[0].disconnected
        assert simulator.requests[0].connection == 0


async def test_https():
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with Simulator(ssl_context=context) as simulator:
        assert simulator.endpoint.startswith("https://")
        assert (await post(simulator, "/caption", CAPTION, ssl=trusting)).status == 200


def test_unknown_dialect_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="known are cloud, kestrel, station, old"):
        Simulator("klingon")


# Faults


LINES = [f"data: {json.dumps({'chunk': word})}\n\n".encode() for word in WORDS]
FAILED = b"Inference failed"
ERROR = b'data: {"error": {"message": "%b", "type": "server_error"}}\n\n' % FAILED
BIG = b'data: {"chunk": "%b", "completed": false}\n\n' % (b"x" * 1000)


@pytest.mark.parametrize(
    ("fault", "sent", "whole"),
    [
        ("cut=0", [], True),
        ("cut=3", LINES[:3], True),
        ("drop=0", [], False),
        ("drop=3", LINES[:3], False),
        ("cut_inside=2", [LINES[0], LINES[1][: len(LINES[1]) // 2]], False),
        ("bad_json=1", [LINES[0], b'data: {"chunk": \n\n', *LINES[1:]], True),
        ("error_event=2", [*LINES[:2], ERROR], True),
        (
            "named_error=2",
            [*LINES[:2], b'event: error\ndata: {"message": "%b"}\n\n' % FAILED],
            True,
        ),
        ("big_event=1000", [BIG, *LINES], True),
        ("heartbeats", [*(b": ping\n\n" + line for line in LINES), b": ping\n\n"], True),
        ("split=3", LINES, True),
    ],
)
async def test_fault_of_a_stream_is_what_it_says(fault, sent, whole):
    answer = await ask("/query", STREAM, "station", faults=[fault])
    assert answer.data.partition(b'data: {"stats"')[0] == b"".join(sent)
    assert answer.whole == whole


async def test_json_comes_where_a_stream_was_asked():
    answer = await ask("/query", STREAM, faults=["json"])
    assert (answer.status, answer.json["answer"]) == (200, "".join(WORDS))


@pytest.mark.parametrize(
    ("fault", "status", "headers", "body"),
    [
        ("status=503", 503, {}, '"type":"server_error"'),
        ("status=429,retry_after=1", 429, {"Retry-After": "1"}, '"type":"rate_limit_exceeded"'),
        ("reject", 200, {}, '{"error":"Queue is full","status":"rejected"}'),
        ("html", 502, {"Content-Type": "text/html"}, "<html>"),
        ("html=200", 200, {"Content-Type": "text/html"}, "<html>"),
        ("redirect=https://example.com/a", 307, {"Location": "https://example.com/a"}, ""),
        ("redirect=302:/b", 302, {"Location": "/b"}, ""),
        ("slow_start=0.01,status=500", 500, {}, '"type":"server_error"'),
    ],
)
async def test_other_answers_take_the_place_of_the_right_one(
    simulator, fault, status, headers, *, body
):
    simulator.faults.append(fault)
    answer = await post(simulator, "/query", STREAM)
    assert answer.status == status
    assert headers.items() <= answer.headers.items()
    assert body.encode() in answer.data
    assert (await post(simulator, "/query", QUERY)).status == 200, "it strikes once"


@pytest.mark.parametrize(
    ("fault", "sent", "message"),
    [
        ("hang_up", 0, "Server disconnected"),
        ("hang_up=reset", 0, "reset by peer"),
        ("reset=2", 2, "reset by peer"),
    ],
)
async def test_connection_is_broken_off_as_the_fault_says(session, simulator, fault, sent, message):
    simulator.faults.append(fault)
    with pytest.raises(aiohttp.ClientError, match=message):
        async with session.post(simulator.endpoint + "/query", json=STREAM) as response:
            await response.read()
    (received,) = simulator.requests
    await received.ended.wait()
    assert (received.disconnected, received.events_sent) == (False, sent), "the server left"


@pytest.mark.parametrize(
    ("dialect", "status", "body"),
    [
        ("kestrel", 503, {"error": "Simulated error 503"}),
        ("station", 503, {"detail": "Inference service not running"}),
        ("station", 404, {"error": "Simulated error 404", "status": "error"}),
        ("old", 400, {"error": "Simulated error 400"}),
    ],
)
async def test_error_status_comes_with_the_body_of_its_server(dialect, status, body):
    answer = await ask("/query", QUERY, dialect, faults=[f"status={status}"])
    assert (answer.status, answer.json) == (status, body)


async def test_faults_strike_the_next_matching_requests_in_order():
    async with Simulator(faults=["status=500,times=2"]) as simulator:
        simulator.faults.append("status=418,path=caption")
        simulator.faults.append("cut=0")
        simulator.faults.append(Fault.parse("status=503"))
        seen = [
            (await post(simulator, path, QUERY)).status
            for path in ("/query", "/query", "/query", "/query", "/caption", "/caption")
        ]
    assert seen == [500, 500, 503, 200, 418, 200]
    assert len(simulator.faults) == 1, "the cut waits for a stream"
    assert simulator.requests[0].fault == Fault((("status", 500),), times=2)


def test_fault_with_times_always_strikes_every_request():
    queue = FaultQueue(["status=500,times=always"])
    assert all(queue.take("/v1/query", stream=False) for _ in range(5))
    queue.clear()
    assert queue.take("/v1/query", stream=False) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("explode", "unknown fault 'explode'; known are status, html, reject, "),
        ("", "no fault in ''; known are"),
        ("times=2", "no fault in"),
        ("cut", "fault 'cut' is written cut=N"),
        ("cut=x", "fault cut is written cut=N, not cut=x"),
        ("html=x", "fault html is written html[=CODE], not html=x"),
        ("hang_up=now", "fault hang_up is written hang_up[=reset]"),
        ("cut=1,times=0", "fault times is written times=N"),
        ("json=1", "fault 'json=1' is written json"),
        ("cut_inside=0", "fault cut_inside is written cut_inside=N"),
        ("cut=1" + "0" * 20, "fault cut is written cut=N"),
        ("slow_start=nan", "fault slow_start is written slow_start=SECONDS"),
    ],
)
def test_text_that_is_no_fault_is_refused_clearly(text, message):
    with pytest.raises(ValueError) as caught:
        Fault.parse(text)
    assert message in str(caught.value)


def test_help_names_every_fault_and_option():
    text = describe_faults()
    for name in (*EFFECTS, "times", "path", "retry_after"):
        assert re.search(rf"^{name}\b", text, re.MULTILINE)
