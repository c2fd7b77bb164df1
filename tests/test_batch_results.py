"""Batches that are under way: waiting for them, and reading what came of them."""

import asyncio
import contextlib
import itertools
import json
import ssl

import pytest
import trustme
from canned import client_of, replying
from raw_server import RawServer, head, whole

import moondream_async as md
from moondream_async.batch import wire as protocol

KEY = "a-key-of-some-length"


# -- waiting --------------------------------------------------------------------------

AWAY = whole({"error": "away"}, status="503 Service Unavailable")


@contextlib.asynccontextmanager
async def batches_of(*states):
    """The batches of a server that answers with these states, the last one for ever."""
    states = [each if isinstance(each, bytes) else {"id": "b", **each} for each in states]
    async with replying(*states) as server, client_of(server) as client:
        yield client.batches, server


@pytest.mark.parametrize(
    "end",
    [
        pytest.param({"status": "expired", "completed_at": "2026-01-15T00:00:00Z"}, id="ended"),
        pytest.param({"status": "cancelled", "error": {"code": "cancelled"}}, id="error"),
        pytest.param({"status": "failed", "error": "a mere string"}, id="error as text"),
    ],
)
async def test_wait_overlooks_later_servers_words_and_a_server_that_is_away_for_a_while(end):
    states = [AWAY, AWAY, {"status": "pondering"}, {"status": None}, *[AWAY] * 5, end]
    async with batches_of(*states) as (batches, _):
        batch = await batches.wait("b", interval=0.001)
    assert (batch.status, batch.done) == (end["status"], True)


async def test_state_is_read_as_far_as_it_makes_sense():
    odd = {
        "status": 7,
        "progress": {"total": "many", "completed": 3, "new": 1},
        "usage": [],
        "outputs": {"index": 0},
        "created_at": "yesterday",
        "model": {"name": "x"},
    }
    async with batches_of(odd) as (batches, _):
        batch = await batches.get("b")
    assert (batch.id, batch.status, batch.done) == ("b", "unknown", False)
    assert batch.progress == md.BatchProgress(completed=3)
    assert (batch.usage, batch.outputs, batch.created_at, batch.model) == (None, [], None, None)
    assert batch.raw == {"id": "b", **odd}


async def test_wait_gives_up_on_a_server_that_stays_away():
    async with batches_of(AWAY) as (batches, server):
        with pytest.raises(md.ServerError, match="away"):
            await batches.wait("b", interval=0.001)
        assert len(server.requests) == 6


async def test_wait_ends_with_its_time_and_at_once_for_an_unknown_batch(client):
    async with batches_of({"status": "processing"}) as (batches, _):
        with pytest.raises(md.APITimeoutError, match=r"within 0.05 seconds") as caught:
            await batches.wait("b", interval=0.001, timeout=0.05)
    assert caught.value.phase == "total"
    with pytest.raises(md.NotFoundError):
        await client.batches.wait("no-such-batch")


# -- results --------------------------------------------------------------------------


def storage(*answers, **options):
    """A server of a batch that has completed, and of its one file of results.

    `answers` are for each download, the last one for ever: bytes, or how to send them.
    """
    waiting, signatures = list(answers), itertools.count(1)

    async def play(peer):
        while True:
            request = await peer.request()
            if request.target.startswith("/v1/"):
                url = f"{server.origin}/out%2F0.jsonl?sig=%7E{next(signatures)}+a%2Bb"
                outputs = [{"index": 0, "url": url}]
                await peer.send(whole({"id": "b", "status": "completed", "outputs": outputs}))
                continue
            answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            await (peer.send(answer) if isinstance(answer, bytes) else answer(peer))

    server = RawServer(play, **options)
    return server


async def results_of(server, **options):
    async with md.MoondreamClient(KEY, endpoint=server.endpoint, **options) as client:
        return [result async for result in client.batches.results("b")]


def downloads(server):
    return [each for each in server.requests if not each.target.startswith("/v1/")]


def file(*lines):
    return whole("".join(f"{line}\n" for line in lines).encode(), kind="application/octet-stream")


def cut(*lines):
    """Answer with the beginning of a file that is longer."""

    async def play(peer):
        await peer.send(head("Content-Length: 1000000") + "".join(lines).encode())
        peer.close()

    return play


SOME = [json.dumps({"line_index": index, "result": {"caption": "x"}}) for index in range(3)]


async def test_results_are_fetched_without_the_key_from_the_address_as_it_is():
    async with replying(file(SOME[0])) as other:
        place = f"Location: {other.origin}/moved?sig=a%2Bb"
        moved = head(place, "Content-Length: 0", status="307 Temporary Redirect")
        async with storage(moved) as server:
            results = await results_of(server, headers={"X-Team": "birds"})
    assert [result.line_index for result in results] == [0]
    [first], [second] = downloads(server), other.requests
    assert first.target == "/out%2F0.jsonl?sig=%7E1+a%2Bb"
    assert second.target == "/moved?sig=a%2Bb"
    for request in (first, second):
        assert KEY not in str(request.headers)
        assert not {"authorization", "x-moondream-auth", "x-team"} & set(request.headers)
    sent = server.requests[0].headers
    assert (sent["x-moondream-auth"], sent["x-team"]) == (KEY, "birds")


async def test_redirect_of_results_that_would_leave_tls_is_not_followed():
    authority = trustme.CA()
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    elsewhere = head("Location: http://127.0.0.1:9/", "Content-Length: 0", status="302 Found")
    async with storage(elsewhere, ssl_context=serving) as server:
        with pytest.raises(md.APIStatusError, match="without TLS"):
            await results_of(server, ssl_context=trusting)


async def test_results_are_read_as_they_arrive():
    read = asyncio.Event()
    lines = [f"{line}\n".encode() for line in SOME]

    async def slowly(peer):
        await peer.send(head(f"Content-Length: {sum(map(len, lines))}"), lines[0])
        await read.wait()
        await peer.send(*lines[1:])

    async with storage(slowly) as server, client_of(server) as client:
        results = client.batches.results("b")
        assert (await anext(results)).line_index == 0
        read.set()
        assert [result.line_index async for result in results] == [1, 2]


NAMED = [json.dumps({"id": name, "result": {"caption": "x"}}) for name in "abc"]
EXPIRED = whole(b"<Error>AccessDenied</Error>", status="403 Forbidden", kind="application/xml")
LONG = "x" * (protocol.MAX_RESULT_BYTES + 1)
DONE, FAILED, LEFT = (True, False), (False, True), (False, False)  # completed, with an error
DOWNLOADS = {  # what is played, the lines that are read, an error, and how each call ends
    "whole": ([file(*SOME)], SOME, None, [DONE]),
    "broken off twice": (
        [cut(SOME[0], "\n", SOME[1][:20]), cut(SOME[1], "\n", SOME[0], "\n"), file(*SOME)],
        SOME,
        None,
        [DONE],
    ),
    "broken off without line indices": ([cut(NAMED[0], "\n"), file(*NAMED)], NAMED, None, [DONE]),
    "broken off in its last line": (
        [whole(SOME[0][:-10].encode()), whole(SOME[0].encode())],
        SOME[:1],
        None,
        [DONE],
    ),
    "expired": ([EXPIRED, file(*SOME)], SOME, None, [FAILED, DONE, DONE]),
    "no result": ([file(SOME[0], "no JSON", SOME[1])], [SOME[0], "{}", SOME[1]], None, [DONE]),
    "left": ([cut(SOME[0], "\n", SOME[1])], SOME[:1], None, [LEFT]),
    "always broken off": (
        [cut(SOME[0], "\n")] * 3,
        SOME[:1],
        (md.APIConnectionError, "lost"),
        [FAILED],
    ),
    "always refused": (
        [EXPIRED] * 2,
        [],
        (md.PermissionDeniedError, "AccessDenied"),
        [FAILED, DONE, FAILED],
    ),
    "too long a line": (
        [file(SOME[0], LONG)],
        SOME[:1],
        (md.APIConnectionError, "limit of 16777216 bytes"),
        [FAILED],
    ),
}


@pytest.mark.parametrize("name", DOWNLOADS)
async def test_download_that_breaks_off_is_begun_again_and_gives_each_result_once(name):
    answers, lines, error, calls = DOWNLOADS[name]
    ends, results = [], []
    async with (
        storage(*answers) as server,
        client_of(server, max_retries=2, hooks=md.Hooks(end=ends.append)) as client,
        contextlib.aclosing(client.batches.results("b")) as reading,
    ):
        told = pytest.raises(error[0], match=error[1]) if error else contextlib.nullcontext()
        with told:
            async for result in reading:
                results.append(result)
                if name == "left":
                    break
        await reading.aclose()
        assert client.stats().open_streams == 0
    assert [result.raw for result in results] == [json.loads(line) for line in lines]
    assert [result.ok for result in results] == [line != "{}" for line in lines]
    signatures = [request.target.partition("sig=")[2][:4] for request in downloads(server)]
    later = "%7E2" if answers[0] is EXPIRED else "%7E1"
    assert signatures == ["%7E1", *[later] * (len(answers) - 1)]
    assert [(event.completed, event.error is not None) for event in ends] == [DONE, *calls]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({}, "no results"),
        *[
            ({"outputs": [{"index": 0, "url": url}]}, "no valid address")
            for url in ("", "ftp://host/x", "http://a/b c", "//x")
        ],
    ],
    ids=str,
)
async def test_completed_batch_that_says_no_place_of_its_results_is_an_error(outputs, message):
    async with batches_of({"status": "completed", **outputs}) as (batches, _):
        with pytest.raises(md.ServerError, match=message):
            await anext(batches.results("b"))


async def test_download_that_stalls_ends_with_the_idle_limit():
    async def stall(peer):
        await peer.send(head("Content-Length: 1000000") + SOME[0].encode())
        await peer.until_gone()

    async with storage(stall) as server:
        with pytest.raises(md.APITimeoutError) as caught:
            await results_of(server, timeout=md.Timeout(idle=0.05))
    assert caught.value.phase == "idle"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"result": {"caption": "x"}}, md.CaptionResult),
        ({"result": {"answer": "x", "reasoning": {"text": "y"}}}, md.QueryResult),
        ({"result": {"objects": []}}, md.DetectResult),
        ({"result": {"points": [{"x": 1, "y": 0}]}}, md.PointResult),
        ({"result": {"dance": 1}}, md.Result),
        ({"result": {"caption": 7}}, md.Result),
        ({"result": "x"}, md.Result),
        ({}, md.Result),
        ({"status": "error", "error": {"code": "c", "message": "m"}}, ("c", "m")),
        ({"status": "error", "error": "m"}, (None, "m")),
        ({"status": "error"}, (None, "the server does not say why")),
        ({"error": {"message": "m"}}, (None, "m")),
    ],
    ids=str,
)
def test_line_is_an_answer_typed_by_what_it_holds_or_an_error_and_never_lost(line, expected):
    result = protocol.read_batch_result(json.dumps(line).encode())
    assert result.raw == line
    assert result.ok == isinstance(expected, type)
    if result.ok:
        assert type(result.result) is expected
    else:
        assert (result.error.code, result.error.message) == expected
        assert result.result is None
