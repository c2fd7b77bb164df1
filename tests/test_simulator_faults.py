"""What goes wrong with a simulator on demand: each fault is what its text says."""

import json
import re

import aiohttp
import pytest
from spoken import post
from test_simulator import QUERY, STREAM, WORDS, ask

from moondream_async.simulator import Fault, FaultQueue, Simulator, describe_faults
from moondream_async.simulator.faults import EFFECTS

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
async def test_connection_is_broken_off_as_the_fault_says(simulator, fault, sent, message):
    simulator.faults.append(fault)
    url = simulator.endpoint + "/query"
    with pytest.raises(aiohttp.ClientError, match=message):
        async with aiohttp.ClientSession() as session, session.post(url, json=STREAM) as response:
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
        ("redirect=/a\nb", "fault redirect is written redirect=URL"),
        ("redirect=/\ud83d", "fault redirect is written redirect=URL"),
        ("status=503,retry_after=1\r2", "fault retry_after is written retry_after=VALUE"),
        ("status=503,retry_after=\ud83d", "fault retry_after is written retry_after=VALUE"),
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
