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
from spoken import SAMPLE, get, post, speak, stream

from moondream_async.simulator import (
    DIALECTS,
    Simulator,
)

CAPTION = {"image_url": SAMPLE}
QUERY = {"image_url": SAMPLE, "question": "What is in this image?"}
STREAM = {**QUERY, "stream": True, "settings": {"max_tokens": 5}}
WORDS = ["A", " bright", " 640\N{MULTIPLICATION SIGN}480", " JPEG", " picture,"]


async def ask(path, body, dialect="cloud", **options):
    """Ask a simulator that is there for this alone."""
    async with Simulator(dialect, **options) as simulator:
        return await post(simulator, path, body)


CHAT = "/chat/completions"


def show(text, *images):
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def say(text, role="user"):
    return {"role": role, "content": text}


def shown_by(role):
    return show("x", SAMPLE) | {"role": role}


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
async def test_health_and_models_have_the_shape_of_their_server_and_the_cloud_alone_chats(
    dialect, more, model
):
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
        assert (await post(simulator, CHAT, {})).status == (400 if dialect == "cloud" else 404)


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
    async with Simulator("kestrel") as simulator:
        answer = await speak(simulator, "POST", "/query", data=b"{")
    assert (answer.status, answer.json) == (400, {"error": "Request body must be valid JSON"})


@pytest.mark.parametrize("megabytes", [11, 20], ids=["picture", "body"])
async def test_too_large_is_refused_with_413(simulator, megabytes):
    image = base64.b64encode(bytes(megabytes * 1024 * 1024)).decode()
    body = io.BytesIO(json.dumps({"image_url": image}).encode())
    answer = await speak(simulator, "POST", "/caption", data=body)
    assert (answer.status, answer.json["error"]["type"]) == (413, "payload_too_large")


async def test_unknown_routes_are_plain_text_and_remembered(simulator):
    gone = await get(simulator, simulator.origin + "/v1/nothing")
    wrong = await get(simulator, "/caption")
    assert (gone.status, gone.data, "Allow" in gone.headers) == (404, b"Not Found", False)
    assert (wrong.status, wrong.data) == (405, b"Method Not Allowed")
    assert wrong.headers["Allow"] == "POST"
    assert all(each.headers["Content-Type"].startswith("text/plain") for each in (gone, wrong))
    seen = [(received.path, received.status) for received in simulator.requests]
    assert seen == [("/v1/nothing", 404), ("/v1/caption", 405)]


async def test_station_answers_errors_with_status_200_and_takes_what_it_can_from_a_request():
    async with Simulator("station") as station:
        no_picture = {"error": "Field 'image_url' is required", "status": "error"}
        no_skill = {"error": "Function 'segment' not available"}
        for path, error in (("/query", no_picture), ("/segment", no_skill)):
            answer = await post(station, path, {"question": "x"})
            assert (answer.status, answer.json) == (200, error)

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


RIGHT, WRONG_KEY = {"X-Moondream-Auth": "right"}, {"X-Moondream-Auth": "wrong"}
BEARER, WRONG_BEARER = {"Authorization": "Bearer right"}, {"Authorization": "Bearer wrong"}
URLLIB = {"User-Agent": "Python-urllib/3.12"}
LET_IN = {  # the status for each way to show a key, or none
    ("POST", "/query"): [(RIGHT, 200), (WRONG_KEY, 401), (BEARER, 401), ({}, 401)],
    ("POST", CHAT): [(BEARER, 200), (RIGHT, 200), (WRONG_BEARER, 401), ({}, 401)],
    ("GET", "/models"): [({}, 200), (BEARER, 200), (WRONG_BEARER, 401), (URLLIB, 403)],
}


@pytest.mark.parametrize(("method", "path"), LET_IN)
async def test_key_is_checked_where_the_cloud_looks_for_it(method, path):
    body = QUERY | {"messages": [say("Hello")]}
    async with Simulator(api_key="right") as simulator:
        for headers, status in LET_IN[method, path]:
            answer = await speak(simulator, method, path, json=body, headers=headers)
            assert answer.status == status, headers
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
    answer = await post(simulator, "/caption", CAPTION)
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
    assert third.bytes_sent == len(answer.data)


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
