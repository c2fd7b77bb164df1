"""The fault table: what can go wrong on the way, and what the caller gets.

Each row is played by a server of bare sockets that shares nothing with the client, to a
streamed and to a plain call. Afterwards no task, socket or place may be left.
``pytest tests/test_faults.py --fault-report`` prints the table as it went.
"""

# ruff: noqa: E501 - a fault is a line, as far as it goes

import asyncio
import datetime as dt
import gzip
import json
import ssl
import time
from typing import NamedTuple

import pytest
import trustme
from canned import IMAGE, client_of
from raw_server import (
    ANSWER,
    CHUNKED,
    DONE,
    EVENT_STREAM,
    EVENTS,
    STREAM,
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

BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(9_000_000), "image/jpeg", 8, 8)
TIMEOUT = md.Timeout(pool=2, connect=5, first_event=0.4, idle=0.4)
BODY = json.dumps(ANSWER).encode()


class Row(NamedTuple):
    name: str
    play: object  # a coroutine function over a Peer
    streamed: object  # the text that comes, or an error as `fails` describes it
    plain: object
    options: dict | None = None
    image: md.EncodedImage = IMAGE


class Fails(NamedTuple):
    kind: type
    attributes: dict


def fails(kind, **attributes):
    return Fails(kind, attributes)


def sends(stream, plain=None, *, then="close"):
    """Play: take a request, send the one or the other, and close, reset or fall silent."""

    async def play(peer):
        request = await peer.request()
        data = stream if request.wants_stream or plain is None else plain
        await peer.send(*([data] if isinstance(data, bytes) else data))
        if then == "reset":
            peer.reset()
        elif then == "silence":
            await peer.until_gone()

    return play


def dribbles(stream, plain, pause=0.0):
    """Play: send it byte by byte."""

    async def play(peer):
        request = await peer.request()
        data = stream if request.wants_stream else plain
        for place in range(len(data)):
            await peer.send(data[place : place + 1])
            await asyncio.sleep(pause)
        await peer.until_gone()

    return play


def repeats(first, again, pause=0.0):
    """Play: send something, and then something again and again."""

    async def play(peer):
        await peer.request()
        await peer.send(first)
        while True:
            await peer.send(again)
            await asyncio.sleep(pause)

    return play


async def goes_away(peer):
    del peer


async def resets(peer):
    peer.reset()


def in_turn(*plays):
    """Play each to one request, the last to all further ones."""
    played = []

    async def play(peer):
        played.append(peer)
        await plays[min(len(played), len(plays)) - 1](peer)

    return play


LOST = fails(md.APIConnectionError)
SLOW = fails(md.APITimeoutError, phase="first_event")


def cut(partial):
    return fails(md.StreamInterruptedError, partial=partial)


def stalled(partial):
    return fails(md.StreamStalledError, phase="idle", partial=partial)


def nonsense(partial=""):
    return fails(md.StreamProtocolError, partial=partial)


def zipped(data, *headers):
    packed = gzip.compress(data)
    return head(f"Content-Length: {len(packed)}", "Content-Encoding: gzip", *headers) + packed


async def send_a_bomb(peer):  # which takes a second to pack
    if (await peer.request()).wants_stream:
        await peer.send(zipped(EVENTS[0] + b"data: " + bytes(100_000_000), EVENT_STREAM))
    else:
        await peer.send(zipped(b" " * 100_000_000, "Content-Type: application/json"))


def status_row(name, status, body, kind, message, **attributes):
    """A row for an error status, which a stream and a plain call get alike."""
    data = json.dumps(body).encode() if not isinstance(body, bytes) else body
    media = "application/json" if not isinstance(body, bytes) else "text/html"
    failure = fails(kind, status=int(status[:3]), message=message, **attributes)
    return Row(name, sends(whole(data, status=status, kind=media)), failure, failure)


def event_row(name, data, message):
    """A row for an error that is reported in the middle of a stream."""
    failure = fails(md.StreamServerError, message=message, partial="A ")
    return Row(name, sends(STREAM_HEAD + in_chunks(EVENTS[0], data), whole(ANSWER)), failure, TEXT)


IN_AN_HOUR = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
INSIDE = STREAM_HEAD + in_chunks(EVENTS[0], EVENTS[1][:12], end=False)
CHUNK_CUT = STREAM_HEAD + in_chunks(EVENTS[0], end=False) + b"20\r\n" + EVENTS[1][:9]
ACCENT = 'data: {"chunk": "é"}'.encode()
OUT_OF_MEMORY = whole({"error": "Out of memory"}, status="500 No")
BROKEN = fails(md.ServerError, status=500)
LONG = b"data: " + b"x" * 17_000_000

ROWS = [
    # -- no answer at all
    Row("closed at once", goes_away, LOST, LOST),
    Row("reset at once", resets, LOST, LOST),
    Row("closed after the request", sends(b""), LOST, LOST),
    Row("reset after the request", sends(b"", then="reset"), LOST, LOST),
    Row("cut in the status line", sends(b"HTTP/1."), LOST, LOST),
    Row("cut in the headers", sends(b"HTTP/1.1 200 OK\r\nContent-Ty"), LOST, LOST),
    Row("reset in the headers", sends(b"HTTP/1.1 200 OK\r\n", then="reset"), LOST, LOST),
    Row("no HTTP", sends(b"220 smtp ready\r\n\r\n"), LOST, LOST),
    Row("headers without end", repeats(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n" * 50), LOST, LOST),
    Row(
        "a header line without end",
        repeats(b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 4096),
        LOST,
        LOST,
    ),
    # -- silence
    Row("never answers", sends(b"", then="silence"), SLOW, SLOW),
    Row("silent in the headers", sends(b"HTTP/1.1 200 OK\r\n", then="silence"), SLOW, SLOW),
    Row("silent after the headers", sends(STREAM_HEAD, then="silence"), SLOW, SLOW),
    Row(
        "silent in the middle",
        sends(
            STREAM_HEAD + in_chunks(EVENTS[0], end=False), whole(ANSWER)[:-9], then="silence"
        ),
        stalled("A "),
        SLOW,
    ),
    Row("only heartbeats", repeats(STREAM_HEAD, in_chunks(b": ping\n\n", end=False), 0.05), SLOW, SLOW),
    Row(
        "heartbeats after an event",
        repeats(STREAM_HEAD + in_chunks(EVENTS[0], end=False), in_chunks(b":\n\n", end=False), 0.05),
        stalled("A "),
        SLOW,
    ),
    Row(
        "an event that never ends, byte by byte",
        repeats(
            STREAM_HEAD + in_chunks(EVENTS[0], b"data: ", end=False), in_chunks(b"x", end=False), 0.02
        ),
        stalled("A "),
        SLOW,
    ),
    Row(
        "headers byte by byte for ever",
        repeats(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.02),
        SLOW,
        SLOW,
    ),
    # -- cut
    Row("closed after the headers", sends(STREAM_HEAD), cut(""), LOST),
    Row("reset after the headers", sends(STREAM_HEAD, then="reset"), cut(""), LOST),
    Row(
        "closed between two events",
        sends(STREAM_HEAD + in_chunks(*EVENTS[:2], end=False), whole(ANSWER)[:-9]),
        cut("A cat "),
        LOST,
    ),
    Row(
        "reset between two events",
        sends(STREAM_HEAD + in_chunks(*EVENTS[:2], end=False), whole(ANSWER)[:-9], then="reset"),
        cut("A cat "),
        LOST,
    ),
    Row(
        "ended in good order before completed",
        sends(STREAM_HEAD + in_chunks(*EVENTS), whole(BODY[:-9])),
        cut(TEXT),
        fails(md.ServerError, status=200),
    ),
    Row("ended with no event", sends(STREAM_HEAD + in_chunks(), whole(b"")), cut(""), fails(md.ServerError)),
    Row("cut inside an event", sends(INSIDE, whole(ANSWER)[:-20]), cut("A "), LOST),
    Row("reset inside an event", sends(INSIDE, whole(ANSWER)[:-20], then="reset"), cut("A "), LOST),
    Row("cut inside a chunk", sends(CHUNK_CUT, STREAM_HEAD + b"20\r\n{"), cut("A "), LOST),
    Row(
        "cut inside a character",
        sends(STREAM_HEAD + in_chunks(EVENTS[0], ACCENT[:-3], end=False), whole(ANSWER)[:-1]),
        cut("A "),
        LOST,
    ),
    Row(
        "shorter than its Content-Length",
        sends(head(EVENT_STREAM, "Content-Length: 9999") + EVENTS[0], whole(ANSWER)[:-1]),
        cut("A "),
        LOST,
    ),
    Row(
        "longer than its Content-Length",
        sends(
            head(EVENT_STREAM, f"Content-Length: {len(EVENTS[0])}") + b"".join(EVENTS) + DONE,
            head("Content-Type: application/json", "Content-Length: 9") + BODY,
        ),
        fails(md.StreamInterruptedError),  # what stands behind the length is no part of it
        fails(md.ServerError),
    ),
    Row(
        "HTTP/1.0, closed too early",
        sends(head(EVENT_STREAM, version="HTTP/1.0") + EVENTS[0], head(version="HTTP/1.0") + BODY[:9]),
        cut("A "),
        fails(md.ServerError, status=200),
    ),
    # -- not what was asked for, and still an answer
    Row("byte by byte", dribbles(STREAM, whole(ANSWER)), TEXT, TEXT),
    Row(
        "HTTP/1.0, closed at the end",
        sends(
            head(EVENT_STREAM, version="HTTP/1.0") + b"".join(EVENTS) + DONE,
            head("Content-Type: application/json", version="HTTP/1.0") + BODY,
        ),
        TEXT,
        TEXT,
    ),
    Row("events as plain text", sends(
        head("Content-Type: text/plain", CHUNKED) + in_chunks(*EVENTS, DONE), whole(ANSWER, kind="text/plain")
    ), TEXT, TEXT),
    Row("events without a type", sends(head(CHUNKED) + in_chunks(*EVENTS, DONE), whole(ANSWER, kind=None)), TEXT, TEXT),
    Row("JSON without a type", sends(whole(ANSWER, kind=None)), TEXT, TEXT),
    Row("JSON where a stream was asked for", sends(whole(ANSWER)), TEXT, TEXT),
    Row("gzip that was not asked for", sends(
        zipped(b"".join(EVENTS) + DONE, EVENT_STREAM), zipped(BODY, "Content-Type: application/json")
    ), TEXT, TEXT),
    Row("100 Continue first", sends(
        head(status="100 Continue") + STREAM, head(status="100 Continue") + whole(ANSWER)
    ), TEXT, TEXT),
    Row("reset after the end", sends(
        STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False), whole(ANSWER), then="reset"
    ), TEXT, TEXT),
    Row("noise after the end", repeats(
        STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False), in_chunks(b"data: [", end=False), 0.001
    ), TEXT, fails(md.APITimeoutError)),
    Row("invalid UTF-8", sends(
        STREAM_HEAD + in_chunks(b'data: {"chunk": "\xff!"}\n\n', DONE), whole(b'{"caption": "\xff"}')
    ), "\N{REPLACEMENT CHARACTER}!", fails(md.ServerError, status=200)),
    # -- nonsense
    Row("malformed JSON", sends(STREAM_HEAD + in_chunks(EVENTS[0], b"data: {oops\n\n"), whole(b"{oops")),
        nonsense("A "), fails(md.ServerError, status=200)),
    Row("JSON that is no object", sends(STREAM_HEAD + in_chunks(EVENTS[0], b"data: [1]\n\n"), whole(b"[1]")),
        nonsense("A "), fails(md.ServerError, status=200)),
    Row("a chunk that is no text", sends(STREAM_HEAD + in_chunks(EVENTS[0], event(7)), whole({"caption": 7})),
        nonsense("A "), fails(md.ServerError, status=200)),
    Row("an answer without the answer", sends(whole({"request_id": "1"})),
        fails(md.ServerError, status=200), fails(md.ServerError, status=200)),
    Row("JSON as deep as it gets", sends(STREAM_HEAD + in_chunks(b"data: " + b"[" * 100_000 + b"\n\n"), whole(b"[" * 100_000)),
        nonsense(), fails(md.ServerError, status=200)),
    Row("HTML in place of events", sends(whole(b"<html>Hello</html>", kind="text/html")),
        nonsense(), fails(md.ServerError, status=200)),
    Row("broken gzip", sends(
        head(EVENT_STREAM, "Content-Encoding: gzip", "Content-Length: 8") + b"no gzip!",
        head("Content-Encoding: gzip", "Content-Length: 8") + b"no gzip!",
    ), cut(""), LOST),
    Row("an event over the limit", sends(STREAM_HEAD + in_chunks(EVENTS[0], LONG), whole(LONG)),
        nonsense("A "), fails(md.ServerError, status=200), {"timeout": md.Timeout()}),
    Row("a gzip bomb", send_a_bomb, nonsense("A "), LOST, {"timeout": md.Timeout()}),
    # -- errors by status: what else servers say is in `test_answers`
    status_row("300", "300 Several", {"error": {"message": "Which?"}}, md.APIStatusError, "Which?"),
    status_row("409", "409 No", {"error": {"message": "Other rank"}}, md.APIStatusError, "Other rank"),
    status_row("500 empty", "500 No", b"", md.ServerError, "HTTP status 500: an empty body"),
    Row("an error, byte by byte", dribbles(OUT_OF_MEMORY, OUT_OF_MEMORY),
        *[fails(md.ServerError, message="Out of memory")] * 2),
    Row("an error without end", repeats(head(CHUNKED, status="500 No"), in_chunks(b"x" * 4096, end=False)), BROKEN, BROKEN),
    Row("an empty error, and noise behind it", sends(whole(b"", status="500 No") + b"\0"), BROKEN, BROKEN),
    # -- errors in the stream
    event_row("an error event", event(error="Out of memory"), "Out of memory"),
    event_row("an error event with an object", event(error={"message": "Out of memory"}), "Out of memory"),
    event_row("an event named error", b"event: error\ndata: out of memory\n\n", "out of memory"),
    event_row("an error in the answer's place", event("An error occurred during caption generation.", completed=True), "An error occurred during caption generation."),
    # -- once
    Row("lost once, before the first event", in_turn(sends(STREAM_HEAD, b""), answer), TEXT, TEXT, {"max_retries": 1}),
]  # fmt: skip


async def ask(client, image, *, streamed):
    """Make the call; return the text that came, or the error."""
    try:
        if streamed:
            stream = await client.caption(image, stream=True)
            return await stream.text()
        return (await client.caption(image)).caption
    except md.MoondreamError as error:
        return error


def check(got, expected):
    if isinstance(expected, str):
        assert got == expected
        return
    assert isinstance(got, expected.kind), repr(got)
    for name, value in expected.attributes.items():
        assert getattr(got, name) == value


def left_over(client, server, before):
    """What a call left behind."""
    tasks = len(asyncio.all_tasks() - before - set(server.tasks if server else ()))
    places = client.stats().open_streams
    return ", ".join([f"{tasks} tasks"] * bool(tasks) + [f"{places} places"] * bool(places)) or "0"


@pytest.fixture(params=["stream", "plain"])
def play(request, fault_report):
    """Makes a call of a client as streamed or not, checks what came, notes it, and tells what is left."""

    async def play(name, client, server, expected, image=IMAGE):
        before = asyncio.all_tasks()
        began = time.monotonic()
        got = await ask(client, image, streamed=request.param == "stream")
        seconds = time.monotonic() - began
        left = left_over(client, server, before)
        what = repr(got) if isinstance(got, str) else f"{type(got).__name__}: {got}"
        partial = f", partial {got.partial!r}" if getattr(got, "partial", "") else ""
        fault_report.append(
            f"{name:42} {request.param:6} {seconds:5.2f} s  {what[:90]}{partial}; left: {left}"
        )
        check(got, expected)
        if not isinstance(got, str):
            assert "\n" not in str(got)
            assert "RawResponseMessage" not in str(got)
        return got, left

    play.streamed = request.param == "stream"
    return play


@pytest.mark.parametrize("row", ROWS, ids=[row.name.replace(" ", "-") for row in ROWS])
async def test_fault(row, play):
    options = {"timeout": TIMEOUT} | (row.options or {})
    async with RawServer(row.play) as server:
        async with client_of(server, **options) as client:
            expected = row.streamed if play.streamed else row.plain
            got, left = await play(row.name, client, server, expected, row.image)
            assert left == "0"
            assert expected is not LOST or client.endpoint.removesuffix("/v1") in str(got)
        await server.until_idle()


async def test_refused_connection(play, nobody):
    async with md.MoondreamClient(endpoint=nobody, max_retries=0) as client:
        got, _ = await play("refused", client, None, LOST)
    assert "127.0.0.1" in str(got)


async def test_refusal_while_the_upload_goes_on_is_heard(play):
    async def refuse(peer):
        await peer.request_head()
        await peer.send(whole({"error": "Too large"}, "Connection: close", status="413 Big"))
        await peer.until_gone()

    expected = fails(md.PayloadTooLargeError, message="Too large")
    async with RawServer(refuse) as server, client_of(server) as client:
        await play("413 while the upload goes on", client, server, expected, BIG_IMAGE)


def server_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


CERTIFICATES = {
    "trusted": (lambda ca: ca.issue_cert("localhost"), True, TEXT),
    "unknown authority": (lambda ca: ca.issue_cert("localhost"), False, LOST),
    "wrong host": (lambda ca: ca.issue_cert("other.example"), True, LOST),
    "expired": (
        lambda ca: ca.issue_cert("localhost", not_after=dt.datetime(2020, 1, 1, tzinfo=dt.UTC)),
        True,
        LOST,
    ),
}


@pytest.mark.parametrize("name", CERTIFICATES)
async def test_certificate(name, play):
    issue, trusted, expected = CERTIFICATES[name]
    authority = trustme.CA()
    context = ssl.create_default_context()
    if trusted:
        authority.configure_trust(context)
    async with (
        RawServer(answer, ssl_context=server_context(issue(authority)), name="localhost") as server,
        md.MoondreamClient(endpoint=server.endpoint, ssl_context=context) as client,
    ):
        got, _ = await play(f"TLS, {name}", client, server, expected)
        if expected is LOST:
            assert got.permanent
            assert server.requests == []


def client_through(proxy, scheme="http"):
    return md.MoondreamClient(
        endpoint=f"{scheme}://moondream.example/v1", proxy=proxy.origin, max_retries=0
    )


@pytest.mark.parametrize("works", [True, False], ids=["works", "refuses"])
async def test_proxy(works, play):
    async def pass_on(peer):
        if works:
            request = await answer(peer)
            assert request.target.startswith("http://moondream.example/v1/")
        else:
            await peer.request()
            await peer.send(whole(b"Who are you?", status="407 Proxy Authentication Required"))

    expected = TEXT if works else fails(md.APIStatusError, status=407)
    async with RawServer(pass_on) as proxy, client_through(proxy) as client:
        name = f"a proxy that {'works' if works else 'refuses'}"
        await play(name, client, proxy, expected)


async def test_proxy_that_refuses_a_tunnel():
    async def refuse(peer):
        method, _, _ = await peer.request_head()
        assert method == "CONNECT"
        await peer.send(head("Content-Length: 0", status="403 Forbidden"))

    async with RawServer(refuse) as proxy, client_through(proxy, "https") as client:
        got = await ask(client, IMAGE, streamed=True)
    check(got, LOST)
    assert "proxy" in str(got)


async def test_an_early_date_to_come_again_is_counted_from_now():
    date = IN_AN_HOUR.strftime("%a, %d %b %Y %H:%M:%S GMT")
    refusal = whole({"error": "x"}, f"Retry-After: {date}", status="503 No")
    async with RawServer(sends(refusal)) as server, client_of(server) as client:
        got = await ask(client, IMAGE, streamed=False)
    assert got.retry_after == pytest.approx(IN_AN_HOUR.timestamp() - time.time(), abs=60)
