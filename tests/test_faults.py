"""The fault table: what can go wrong on the way, and what the caller gets.

Each row is played by a server of bare sockets that shares nothing with the client, to a
streamed and to a plain call, and, where the connection ends, to a stream that is read only
afterwards. Then no task, socket or slot may be left. What is silent, in a time of its own, is
in `test_deadlines.py`; what is wrong with an event or an answer, without sockets, in
`test_events.py` and `test_answers.py`.
``pytest tests/test_faults.py --fault-report`` prints the table as it went.
"""

import asyncio
import datetime as dt
import json
import ssl
import time
import zlib
from typing import NamedTuple

import pytest
from canned import IMAGE, client_of, rounds
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
    head,
    in_chunks,
    tls,
    whole,
)

import moondream_async as md

BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(9_000_000), "image/jpeg", 8, 8)


class Fails:
    """What is expected of an error."""

    def __init__(self, kind, **attributes):
        self.kind = kind
        self.attributes = attributes


class Row(NamedTuple):
    play: object  # a coroutine function over a Peer
    streamed: object  # the text that comes, or the error
    plain: object
    timeout: md.Timeout = md.Timeout(pool=2, connect=5, first_event=0.4, idle=0.4)


def alike(expected, play):
    return Row(play, expected, expected)


def answers(stream, plain):
    """Return a row for what is not what was asked for, and still an answer."""
    return alike(TEXT, sends(stream, plain))


# -- what servers play ----------------------------------------------------------------


def sends(stream, plain=None, *, reset=False):
    """Take a request, send the one or the other in packets, and close or reset."""

    async def play(peer):
        request = await peer.request()
        data = stream if request.wants_stream or plain is None else plain
        for packet in [data] if isinstance(data, bytes) else data:
            await peer.send(packet)
            await rounds(5)
        if reset:
            peer.reset()

    return play


def dribbles(stream, plain):
    """Send it byte by byte."""
    return sends(*([bytes([each]) for each in data] for data in (stream, plain)))


def repeats(first, again, pause=0.0):
    """Send something, and then something again and again."""

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


def zipped(kind, start, again=b"", times=0):
    """Return an answer with `times` something at its end, which nobody packs so often."""
    packing = zlib.compressobj(wbits=31)
    packed = packing.compress(start) + packing.flush(zlib.Z_FULL_FLUSH)
    if times:
        packed += (packing.compress(again) + packing.flush(zlib.Z_FULL_FLUSH)) * times
    else:
        packed += packing.flush()
    return head(f"Content-Length: {len(packed)}", "Content-Encoding: gzip", kind) + packed


def bomb(kind, start):
    return zipped(kind, start, b" " * 2**20, 100)


# -- the table ------------------------------------------------------------------------

LOST = Fails(md.APIConnectionError)
SLOW = Fails(md.APITimeoutError, phase="first_event")
BROKEN = Fails(md.ServerError, status=500)
NO_ANSWER = Fails(md.ServerError, status=200)
STALLED = Fails(md.StreamStalledError, phase="idle", partial="A ")


def cut(partial):
    return Fails(md.StreamInterruptedError, partial=partial)


def nonsense(partial):
    return Fails(md.StreamProtocolError, partial=partial)


JSON = "Content-Type: application/json"
BODY = json.dumps(ANSWER).encode()
DATA = b"".join(EVENTS)
LENGTH = len(DATA)
HALF = EVENTS[1][:12]
ACCENT = 'data: {"chunk": "é"}'.encode()
PACKETS = [STREAM_HEAD, *(in_chunks(each, end=False) for each in EVENTS)]
BEGUN = STREAM_HEAD + in_chunks(EVENTS[0], end=False)
COMPLETE = STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False)

# What has come of a stream, and of a plain answer, when their connection ends. What stands
# behind a length, is no part of an answer.
CUTS = {
    "between two events": (PACKETS, whole(ANSWER)[:-9]),
    "inside an event": ([*PACKETS, in_chunks(HALF, end=False)], whole(ANSWER)[:-20]),
    "inside a character": ([*PACKETS, in_chunks(ACCENT[:-3], end=False)], whole(ANSWER)[:-1]),
    "inside a chunk": ([*PACKETS, b"100\r\n" + HALF], STREAM_HEAD + b"20\r\n{"),
    "inside a chunk's size": ([*PACKETS, b"10"], STREAM_HEAD + b"2"),
    "after a chunk": (b"".join(PACKETS)[:-2], STREAM_HEAD + in_chunks(BODY, end=False)[:-2]),
    "before its length": (
        head(EVENT_STREAM, f"Content-Length: {LENGTH + 40}") + DATA,
        whole(ANSWER)[:-1],
    ),
}
ENDS = {
    "in good order": ([*PACKETS, in_chunks()], whole(BODY[:-9])),
    "in good order, inside an event": ([*PACKETS, in_chunks(HALF)], whole(BODY[:-20])),
    "at its length": (
        head(EVENT_STREAM, f"Content-Length: {LENGTH}") + DATA + DONE,
        head(JSON, "Content-Length: 9") + BODY,
    ),
    "at its length, inside an event": (
        head(EVENT_STREAM, f"Content-Length: {LENGTH + 12}") + DATA + HALF,
        head(JSON, "Content-Length: 20") + BODY,
    ),
    "without a length": (head(EVENT_STREAM) + DATA, head(JSON) + BODY[:9]),
    "by HTTP/1.0": (
        head(EVENT_STREAM, version="HTTP/1.0") + DATA,
        head(JSON, version="HTTP/1.0") + BODY[:9],
    ),
}
ENDED = {
    **{f"closed {name}": Row(sends(*sent), cut(TEXT), LOST) for name, sent in CUTS.items()},
    **{
        f"reset {name}": Row(sends(*CUTS[name], reset=True), cut(TEXT), LOST)
        for name in ("between two events", "inside an event", "inside a chunk", "before its length")
    },
    **{f"ended {name}": Row(sends(*sent), cut(TEXT), NO_ANSWER) for name, sent in ENDS.items()},
    "reset without a length": Row(
        sends(*ENDS["without a length"], reset=True), cut(TEXT), NO_ANSWER
    ),
    # What is complete, is not lost with its connection.
    "closed after the end": answers(COMPLETE, whole(ANSWER)),
    "reset after the end": alike(TEXT, sends(COMPLETE, whole(ANSWER), reset=True)),
    "half a chunk after the end": answers(COMPLETE + b"ff\r\nmore", whole(ANSWER) + b"more"),
    "much noise after the end": answers(
        STREAM_HEAD + in_chunks(*EVENTS, DONE, b"noise" * 100_000, end=False), whole(ANSWER)
    ),
}
ROWS = ENDED | {
    # -- no answer at all
    "closed at once": alike(LOST, goes_away),
    "reset at once": alike(LOST, resets),
    "cut in the status line": alike(LOST, sends(b"HTTP/1.")),
    "cut in the headers": alike(LOST, sends(b"HTTP/1.1 200 OK\r\nContent-Ty")),
    "reset in the headers": alike(LOST, sends(b"HTTP/1.1 200 OK\r\n", reset=True)),
    "no HTTP": alike(LOST, sends(b"220 smtp ready\r\n\r\n")),
    "headers without end": alike(LOST, repeats(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n" * 50)),
    "a header without end": alike(LOST, repeats(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 4096)),
    # -- noise, and never an answer
    "headers byte by byte": alike(SLOW, repeats(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", 0.05)),
    "heartbeats": alike(SLOW, repeats(STREAM_HEAD, in_chunks(b": ping\n\n", end=False), 0.05)),
    "an event byte by byte": Row(
        repeats(BEGUN + in_chunks(b"data: ", end=False), in_chunks(b"x", end=False), 0.05),
        STALLED,
        SLOW,
    ),
    "noise after the end": Row(
        repeats(COMPLETE, in_chunks(b"data: [", end=False), 0.05), TEXT, SLOW
    ),
    # -- not what was asked for, and still an answer
    "byte by byte": alike(TEXT, dribbles(STREAM, whole(ANSWER))),
    "HTTP/1.0, closed at the end": answers(
        head(EVENT_STREAM, version="HTTP/1.0") + DATA + DONE,
        head(JSON, version="HTTP/1.0") + BODY,
    ),
    "as plain text": answers(
        head("Content-Type: text/plain", CHUNKED) + in_chunks(*EVENTS, DONE),
        whole(ANSWER, kind="text/plain"),
    ),
    "without a type": answers(head(CHUNKED) + in_chunks(*EVENTS, DONE), whole(ANSWER, kind=None)),
    "always JSON": answers(whole(ANSWER, kind=None), whole(ANSWER)),
    "gzip": answers(zipped(EVENT_STREAM, DATA + DONE), zipped(JSON, BODY)),
    "100 Continue first": answers(
        head(status="100 Continue") + STREAM, head(status="100 Continue") + whole(ANSWER)
    ),
    "a long header": alike(TEXT, sends(whole(ANSWER, f"Content-Security-Policy: {'x' * 30_000}"))),
    # -- nonsense
    "invalid UTF-8": Row(
        sends(
            STREAM_HEAD + in_chunks(b'data: {"chunk": "\xff!"}\n\n', DONE),
            whole(b'{"caption": "\xff"}'),
        ),
        "\N{REPLACEMENT CHARACTER}!",
        NO_ANSWER,
    ),
    "no JSON": Row(
        sends(BEGUN + in_chunks(b"data: {oops\n\n"), whole(b"{oops")), nonsense("A "), NO_ANSWER
    ),
    "HTML": Row(sends(whole(b"<html>Hello</html>", kind="text/html")), nonsense(""), NO_ANSWER),
    "broken gzip": Row(
        sends(
            *(head(each, "Content-Encoding: gzip") + b"no gzip!" for each in (EVENT_STREAM, JSON))
        ),
        cut(""),
        LOST,
    ),
    "a gzip bomb": Row(
        sends(bomb(EVENT_STREAM, EVENTS[0] + b"data: "), bomb(JSON, b"")),
        nonsense("A "),
        LOST,
        md.Timeout(),
    ),
    # -- errors by status
    "300": alike(
        Fails(md.APIStatusError, status=300, message="Which?"),
        sends(whole({"error": {"message": "Which?"}}, status="300 Several")),
    ),
    "an error, byte by byte": alike(
        Fails(md.ServerError, message="Out of memory"),
        dribbles(*[whole({"error": "Out of memory"}, status="500 No")] * 2),
    ),
    "an error whose body hangs": alike(
        BROKEN, repeats(head("Content-Length: 100", status="500 No") + b'{"error": "i', b"t", 0.05)
    ),
    "an error without end": alike(
        BROKEN, repeats(head(CHUNKED, status="500 No"), in_chunks(b"x" * 4096, end=False))
    ),
    "an empty error, and noise": alike(BROKEN, sends(whole(b"", status="500 No") + b"\0")),
}


async def ask(client, reader, server=None, image=IMAGE):
    """Make the call; return the text that came, or the error."""
    try:
        if reader == "plain":
            return (await client.caption(image)).caption
        stream = await client.caption(image, stream=True)
        if reader == "slow":
            await server.until_idle()
            await rounds()
        return await stream.text()
    except md.MoondreamError as error:
        return error


def left_over(client, server, before):
    """What a call left behind."""
    tasks = len(asyncio.all_tasks() - before - set(server.tasks if server else ()))
    slots = client.stats().open_streams
    return ", ".join([f"{tasks} tasks"] * bool(tasks) + [f"{slots} slots"] * bool(slots)) or "0"


@pytest.fixture
def play(fault_report):
    """Makes a call of a client, checks what came and what is left, and notes it."""

    async def play(name, client, server, expected, reader="plain", **options):
        before = asyncio.all_tasks()
        began = time.monotonic()
        got = await ask(client, reader, server, **options)
        seconds = time.monotonic() - began
        left = left_over(client, server, before)
        what = repr(got) if isinstance(got, str) else f"{type(got).__name__}: {got}"
        partial = f", partial {got.partial!r}" if getattr(got, "partial", "") else ""
        fault_report.append(
            f"{name:42} {reader:6} {seconds:5.2f} s  {what[:90]}{partial}; left: {left}"
        )
        if isinstance(expected, str):
            assert got == expected
            return got, left
        assert isinstance(got, expected.kind), repr(got)
        for attribute, value in expected.attributes.items():
            assert getattr(got, attribute) == value
        assert "\n" not in str(got)
        assert "RawResponseMessage" not in str(got)
        return got, left

    return play


both = pytest.mark.parametrize("reader", ["stream", "plain"])
CELLS = [
    *((name, reader) for name in ROWS for reader in ("stream", "plain")),
    *((name, "slow") for name in ENDED),
]


@pytest.mark.parametrize(("name", "reader"), CELLS, ids=lambda each: each.replace(" ", "-"))
async def test_fault(name, reader, play):
    row = ROWS[name]
    async with RawServer(row.play) as server:
        async with client_of(server, timeout=row.timeout) as client:
            expected = row.plain if reader == "plain" else row.streamed
            got, left = await play(name, client, server, expected, reader)
            assert left == "0"
            assert expected is not LOST or client.endpoint.removesuffix("/v1") in str(got)
        await server.until_idle()


@both
async def test_refused_connection(play, nobody, reader):
    async with md.MoondreamClient(endpoint=nobody, max_retries=0) as client:
        got, _ = await play("refused", client, None, LOST, reader)
    assert "127.0.0.1" in str(got)


@both
async def test_refusal_while_the_upload_goes_on_is_heard(play, reader):
    async def refuse(peer):
        await peer.request_head()
        await peer.send(whole({"error": "Too large"}, "Connection: close", status="413 Big"))
        await peer.until_gone()

    expected = Fails(md.PayloadTooLargeError, message="Too large")
    async with RawServer(refuse) as server, client_of(server) as client:
        name = "413 while the upload goes on"
        await play(name, client, server, expected, reader, image=BIG_IMAGE)


LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
CERTIFICATES = {
    "trusted": ("localhost", None, True, TEXT),
    "unknown authority": ("localhost", None, False, LOST),
    "wrong host": ("other.example", None, True, LOST),
    "expired": ("localhost", LONG_AGO, True, LOST),
}


@pytest.mark.parametrize("name", CERTIFICATES)
async def test_certificate(name, play):
    host, until, trusted, expected = CERTIFICATES[name]
    served, context = tls(host, until)
    if not trusted:
        context = ssl.create_default_context()
    async with (
        RawServer(answer, ssl_context=served, name="localhost") as server,
        md.MoondreamClient(endpoint=server.endpoint, ssl_context=context) as client,
    ):
        got, _ = await play(f"TLS, {name}", client, server, expected)
        if expected is LOST:
            assert got.permanent
            assert server.requests == []


async def test_an_early_date_to_come_again_is_counted_from_now():
    date = dt.datetime(2100, 1, 1, tzinfo=dt.UTC)
    said = date.strftime("Retry-After: %a, %d %b %Y %H:%M:%S GMT")
    async with (
        RawServer(sends(whole({"error": "x"}, said, status="503 No"))) as server,
        client_of(server) as client,
    ):
        got = await ask(client, "plain")
    assert got.retry_after == pytest.approx(date.timestamp() - time.time(), abs=60)
