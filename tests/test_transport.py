"""Bytes on real sockets: flow control, kept connections, redirects, TLS.

How connections are cut is in the fault table, `test_faults.py`.
"""

import asyncio
import contextlib
import errno
import itertools
import os
import socket
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer,
    answer_all,
    event,
    head,
    in_chunks,
    stall,
    tls,
    whole,
)

import moondream_async as md
from moondream_async._transport import bodies, private
from moondream_async._transport.faults import is_disconnect

BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(3_000_000), "image/jpeg", 8, 8)


# -- flow control ---------------------------------------------------------------------

PIECE = "x" * 4000
BOUND = 16_000_000  # the kernel's buffers of both sides, at the most that Linux sets by itself


async def talk_without_end(peer):
    await peer.request()
    await peer.send(STREAM_HEAD)
    chunk = in_chunks(event(PIECE), end=False)
    while True:
        await peer.send(chunk)


async def leveled_off(peer):
    """Wait until the server can send no more; return how much it has sent."""
    sent = -1
    while sent != peer.bytes_sent:
        sent = peer.bytes_sent
        await rounds(1000)
    return sent


async def test_reader_that_stops_stops_the_server_and_memory_is_flat():
    async with played(talk_without_end) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        assert await anext(stream) == PIECE
        (peer,) = server.peers
        sent = await leveled_off(peer)
        print(f"sent to a reader that stopped: {sent:,} bytes")  # noqa: T201 - a figure, with -s
        assert sent < BOUND
        tracemalloc.start()
        try:
            for _ in range(3):
                while peer.bytes_sent == sent:  # all that the kernel holds goes through the client
                    await anext(stream)
                    stream._said = None  # the answer itself is kept, as promised
                    await asyncio.sleep(0)
                before, sent = sent, await leveled_off(peer)
                assert sent - before < BOUND
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2_000_000
        await stream.aclose()
        await server.until_idle()


async def test_slow_reader_gets_the_whole_answer():
    pieces = [f"{number} " + PIECE for number in range(2000)]

    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        for piece in pieces:
            await peer.send(in_chunks(event(piece), end=False))
        await peer.send(in_chunks(DONE))
        await peer.until_gone()

    async with played(play) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        got = [await anext(stream)]
        await leveled_off(server.peers[0])
        got += [piece async for piece in stream]
        assert got == pieces
        assert stream.completed


# -- kept connections -----------------------------------------------------------------


def answer_once(*, reset):
    """Answer one request, and close the connection just as the next arrives on it."""

    async def play(peer):
        await answer(peer)
        await peer.next_byte()
        if reset:
            peer.reset()

    return play


@pytest.mark.parametrize("image", [IMAGE, BIG_IMAGE], ids=["small", "big"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.slow
async def test_request_that_meets_a_connection_just_closed_goes_again_uncounted(reset, image):
    calls = 30 if image is IMAGE else 6
    async with played(answer_once(reset=reset)) as (server, client):
        for number in range(calls):
            if number % 2:
                assert await (await client.caption(image, stream=True)).text() == TEXT
            else:
                assert (await client.caption(image)).caption == TEXT
        assert len(server.requests) == calls
        assert len(server.peers) == calls


def caused(error, cause):
    error.__cause__ = cause
    return error


def test_a_connection_that_the_server_has_closed_is_told_from_other_faults():
    closed = [
        aiohttp.ServerDisconnectedError(),
        ConnectionResetError("Connection lost"),
        aiohttp.ClientOSError(errno.EPIPE, "Broken pipe"),
        caused(aiohttp.ClientOSError(), ConnectionResetError("Connection lost")),
    ]
    others = [aiohttp.ClientOSError(errno.EHOSTUNREACH, "No route"), aiohttp.ClientPayloadError()]
    assert [error for error in closed + others if is_disconnect(error)] == closed


async def test_large_bytes_are_decoded_in_parts_between_which_other_tasks_run(monkeypatch):
    monkeypatch.setattr(bodies, "monotonic", partial(next, itertools.count(0, 0.003)))
    loop, packet, read, turns = asyncio.get_running_loop(), bytearray(100_000), [], set()
    sent = [b"", packet]

    async def readany():
        return sent.pop()

    def turn():
        turns.add(len(read))
        if sent:
            loop.call_soon(turn)

    response = SimpleNamespace(
        status=200, headers={}, connection=None, content=SimpleNamespace(readany=readany)
    )
    pool = SimpleNamespace(loop=loop, bodies=set(), discard=lambda _: None)
    loop.call_soon(turn)
    async for part in bodies.Body(pool, response, lambda _: None):
        read.append(part)  # noqa: PERF401 - `turn` looks at it meanwhile
    assert b"".join(read) == bytes(100_000)
    assert max(map(len, read)) <= 8 * 1024
    assert turns == set(range(2, 14, 2))  # every 5 ms, at 3 ms for each look at the clock
    assert pool.bodies
    packet.clear()  # which a view of it would refuse: a body that waits holds no packet


def connection(number, *, closing=False):
    sock = None if number is None else SimpleNamespace(fileno=lambda: number)
    transport = SimpleNamespace(is_closing=lambda: closing, get_extra_info=lambda _: sock)
    return SimpleNamespace(should_close=False, transport=transport)


def test_connection_without_an_open_socket_is_used_no_more_and_needs_no_end():
    assert not private.is_quiet(connection(-1))
    assert not private.is_quiet(connection(0, closing=True))
    assert private.is_quiet(connection(None))
    private.disown(SimpleNamespace(_conns={}, _acquired=[connection(None), connection(-1)]))
    gone = connection(-1, closing=True).transport
    private.close_transport(gone, SimpleNamespace(is_closed=lambda: False))


@pytest.mark.parametrize("said", ["", "408"])
async def test_request_goes_again_once_however_many_closed_connections_were_kept(said):
    seen = 0

    async def play(peer):
        nonlocal seen
        await answer(peer)
        await peer.next_byte()
        seen += 1
        await peer.send(STRAYS["408"] if said else b"")

    async with played(play) as (server, client):
        await asyncio.gather(*[client.caption(IMAGE) for _ in range(50)])
        kept = len(server.peers)
        assert kept > 10
        assert (await client.caption(IMAGE)).caption == TEXT
        assert (seen, len(server.peers)) == (1, kept + 1)


WRONG = whole({"caption": "of nobody", "answer": "of nobody"})
STRAYS = {
    "an-answer": WRONG,
    "a-stream": STREAM,
    "half-a-head": WRONG[:20],
    "half-a-body": WRONG[:-5],
    "a-line-break": b"\r\n",
    "408": whole(b"", "Connection: close", status="408 Request Timeout"),
    "noise": b"\0\0\0",
}


# The stray, when it comes, and in which event loop. Only a 408 can come together with the next
# request and be no answer to it.
CELLS = [
    *((stray, when, "asyncio") for stray in STRAYS for when in ("at-once", "while-idle")),
    ("408", "with-the-next", "asyncio"),
    ("an-answer", "while-idle", "uvloop"),
    ("half-a-head", "at-once", "uvloop"),
    ("408", "with-the-next", "uvloop"),
]
LOOPS = {name: ("asyncio", {"use_uvloop": name == "uvloop"}) for name in ("asyncio", "uvloop")}
in_each_loop = pytest.mark.parametrize("anyio_backend", LOOPS.values(), ids=LOOPS)


@pytest.mark.parametrize(
    ("stray", "when", "anyio_backend"),
    [(stray, when, LOOPS[loop]) for stray, when, loop in CELLS],
    ids=map("-".join, CELLS),
)
async def test_no_call_gets_what_it_did_not_ask_for(stray, when):
    async def play(peer):
        await answer(peer)
        if when == "with-the-next":
            await peer.next_byte()
        await peer.send(STRAYS[stray])
        await peer.until_gone()

    async with played(play) as (server, client):
        for _ in range(3):
            assert (await client.caption(IMAGE)).caption == TEXT
            if when == "while-idle":
                await rounds()
            assert await (await client.caption(IMAGE, stream=True)).text() == TEXT
            if when == "while-idle":
                await rounds()
        await client.aclose()
        await server.until_idle()


async def test_what_stands_behind_an_answer_takes_nothing_from_it():
    noises = [b"\0", b"noise\r\n\r\n", WRONG, b"0\r\n\r\n"] * 2

    async def play(peer):
        while True:
            request = await peer.request()
            said = STREAM if request.wants_stream else whole(ANSWER)
            await peer.send(said + noises.pop())

    async with played(play) as (_, client):
        for _ in range(4):
            assert (await client.caption(IMAGE)).caption == TEXT
        for _ in range(4):
            assert await (await client.caption(IMAGE, stream=True)).text() == TEXT


def sockets_of_client(server):
    """Return the numbers of this process's sockets that lead to a server."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # no socket, or none that leads anywhere
            peer = socket.socket(fileno=int(entry.name))
            try:
                if peer.getpeername()[:2] == ("127.0.0.1", server.port):
                    found.append(peer.fileno())
            finally:
                peer.detach()
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system doesn't tell")
@in_each_loop
async def test_routers_are_shown_that_an_idle_connection_is_in_use():
    """A model may think for minutes; routers forget connections after five, or less."""
    async with played(answer_all) as (server, client):
        await client.caption(IMAGE)
        (number,) = sockets_of_client(server)
        with socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            first, again, probes = (
                sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
                for name in ("IDLE", "INTVL", "CNT")
            )
        assert first <= 120
        assert again * probes <= 120


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_large_answer_is_not_decoded_while_the_loop_waits(stream):
    async def play(peer):
        await peer.request()
        await peer.send(whole({"caption": "x" * 2_100_000}))

    def note(_frame, kind, function):
        if kind == "c_call" and "decode" in repr(function) and "json" in repr(function).lower():
            decoded.append(function)

    decoded = []
    async with played(play) as (_, client):
        sys.setprofile(note)  # of this thread alone
        try:
            answer = await client.caption(IMAGE, stream=stream)
        finally:
            sys.setprofile(None)
        assert len(await answer.text() if stream else answer.caption) == 2_100_000
    assert decoded == []


@pytest.mark.parametrize("coding", ["br", "zstd"])
async def test_answer_in_a_coding_that_nobody_asked_for_is_said_once(coding):
    async def play(peer):
        while True:
            await peer.request()
            await peer.send(whole(b"\x8b\x08", f"Content-Encoding: {coding}"))

    async with played(play, max_retries=3) as (server, client):
        with pytest.raises(md.MoondreamError) as caught:
            await client.caption(IMAGE)
        assert isinstance(caught.value, md.ServerError) or coding in str(caught.value)
        assert len(server.requests) == 1


async def test_connection_that_the_server_closed_while_idle_is_replaced():
    async with played(answer) as (server, client):
        for _ in range(10):
            await client.caption(IMAGE)
            await server.until_idle()
            await rounds(10)
        assert len(server.peers) == 10


async def test_localhost_is_found_without_a_network(monkeypatch):
    look_up = socket.getaddrinfo

    def without_a_network(*args, flags=0):
        if flags & socket.AI_ADDRCONFIG:
            raise socket.gaierror
        return look_up(*args, flags=flags)

    monkeypatch.setattr(socket, "getaddrinfo", without_a_network)
    async with RawServer(answer_all, name="localhost") as server, client_of(server) as client:
        assert (await client.caption(IMAGE)).caption == TEXT


# -- redirects ------------------------------------------------------------------------


def redirect(status, location, *, times=1):
    """Redirect the first requests of the server, and answer the others."""
    left = [times]

    async def play(peer):
        while True:
            request = await peer.request()
            if left[0]:
                left[0] -= 1
                moved = head(f"Location: {location}", "Content-Length: 0", status=f"{status} Moved")
                await peer.send(moved)
            else:
                await peer.send(STREAM if request.wants_stream else whole(ANSWER))

    return play


@pytest.mark.parametrize(
    ("status", "location"),
    [(301, "/v2/caption"), (302, "v2/caption?x=1"), (307, "{origin}/v2"), (308, "/v2")],
)
async def test_redirect_within_the_origin_is_followed_with_method_body_and_key(status, location):
    async with RawServer(None) as server, client_of(server, api_key="a-key") as client:
        server._play = redirect(status, location.format(origin=server.origin))
        assert (await client.caption(IMAGE)).caption == TEXT
        first, second = server.requests
        assert (second.method, second.body) == ("POST", first.body)
        assert second.target != first.target
        for name in ("content-length", "x-moondream-auth"):
            assert second.headers[name] == first.headers[name]


@pytest.mark.parametrize(
    ("status", "location", "message"),
    [
        (303, "/v1/elsewhere", "POST to a GET"),
        (307, "https://127.0.0.1/v1", "another origin"),
        (307, "http://127.0.0.1:1/v1", "another origin"),
        (308, "http://elsewhere.invalid/v1", "another origin"),
        (302, "//elsewhere.invalid/v1", "another origin"),
        (307, "file:///etc/passwd", "no valid address"),
        (307, "http://[::1/v1", "no valid address"),
        (307, "mailto:somebody@elsewhere.invalid", "no valid address"),
        (307, "/v1/caption", "in circles"),
        (307, "", "in circles"),
    ],
)
async def test_redirect_that_cannot_be_followed_is_an_error(status, location, message):
    async with played(redirect(status, location, times=100)) as (server, client):
        with pytest.raises(md.APIStatusError, match=message) as caught:
            await client.caption(IMAGE)
        assert caught.value.status == status
        asked = [request.method for request in server.requests]
        assert asked == ["POST"] * (6 if "circles" in message else 1)
        with pytest.raises(md.APIStatusError, match=message):
            await client.caption(IMAGE, stream=True)


async def test_redirect_to_a_get_is_followed_by_no_other_method():
    async with played(redirect(303, "/v1/elsewhere", times=100)) as (server, client):
        with pytest.raises(md.APIStatusError, match="a DELETE to a GET"):
            await client.tuning.delete("01HX")
        assert len(server.requests) == 1


# -- TLS ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def over_tls(play, **options):
    served, trusted = tls()
    async with (
        RawServer(play, ssl_context=served) as server,
        client_of(server, ssl_context=trusted, **options) as client,
    ):
        yield server, client


@pytest.mark.parametrize(
    ("scheme", "size", "stream", "anyio_backend"),
    [
        ("http", 1_000, False, LOOPS["asyncio"]),
        ("http", 3_000_000, False, LOOPS["asyncio"]),
        ("http", 100_000, True, LOOPS["asyncio"]),
        ("https", 1_000, True, LOOPS["uvloop"]),
        ("https", 100_000, False, LOOPS["asyncio"]),
        ("https", 3_000_000, True, LOOPS["asyncio"]),
    ],
    ids=lambda each: each if isinstance(each, int | str) else each[1]["use_uvloop"] * "uvloop",
)
async def test_calls_with_pictures_of_any_size_go_over_one_connection(scheme, size, stream):
    """The answer to a large picture may be there before its last bytes are known to have gone."""
    image = md.EncodedImage(b"\xff\xd8" + bytes(size), "image/jpeg", 8, 8)
    async with (over_tls if scheme == "https" else played)(answer_all) as (server, client):
        for _ in range(4):
            answer = await client.caption(image, stream=stream)
            assert (await answer.text() if stream else answer.caption) == TEXT
        assert len(server.peers) == 1
        request = server.requests[-1]
        assert int(request.headers["content-length"]) == len(request.body)
        assert request.json["image_url"] == image.image_url


@pytest.mark.parametrize("by", ["cancelling its reader", "closing the client in another loop"])
async def test_stream_over_tls_that_is_ended_is_closed_at_once(by):
    async with over_tls(stall) as (server, client):
        stream = await client.caption(IMAGE, stream=True)
        await anext(stream)
        if by == "cancelling its reader":
            reader = asyncio.ensure_future(stream.text())
            await rounds()
            reader.cancel()
            await asyncio.wait([reader])
        else:
            await asyncio.to_thread(asyncio.run, client.aclose())
        await server.until_idle()
        with pytest.raises(md.ClientClosedError):
            await anext(stream)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
async def test_stream_over_tls_that_is_cut_raises(reset):
    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD + in_chunks(*EVENTS, end=False))
        if reset:
            peer.reset()

    async with over_tls(play) as (_, client):
        stream = await client.caption(IMAGE, stream=True)
        with pytest.raises(md.StreamInterruptedError) as caught:
            await stream.text()
        assert caught.value.partial == TEXT


async def test_ssl_context_serves_a_session_of_the_caller_too():
    async with aiohttp.ClientSession() as session, over_tls(answer_all, session=session) as (_, it):
        assert (await it.caption(IMAGE)).caption == TEXT


async def test_an_address_where_nobody_listens_is_named_with_the_systems_reason(nobody):
    async with md.MoondreamClient(endpoint=nobody, max_retries=0) as client:
        with pytest.raises(md.APIConnectionError) as caught:
            await client.caption(IMAGE)
    where, reason = nobody.removesuffix("/v1"), os.strerror(errno.ECONNREFUSED)
    assert str(caught.value) == f"Could not connect to {where}: {reason}"
