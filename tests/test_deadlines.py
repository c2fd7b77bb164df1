"""Every limit of `Timeout` ends what it is for, in its time and under its name, and nothing else.

The clock is the test's own: a day passes as fast as a second, and what is said of the time is
exact. `test_clock.py` says what counts as progress in a stream.
"""

import asyncio
import contextlib
import socket
import types
from operator import methodcaller

import pytest
from canned import IMAGE, played
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    RawServer,
    answer_all,
    head,
    in_chunks,
    listen,
    stall,
    whole,
)

import moondream_async as md
from moondream_async._call.deadline import CallDeadline

pytestmark = pytest.mark.own_time

DAY = 86_400.0
FOR_EVER = {"pool": None, "connect": None, "first_event": None, "idle": None, "total": None}


def only(**limits):
    """No limits but these."""
    return md.Timeout(**(FOR_EVER | limits))


def client_of(server, *, tls=False, **options):
    endpoint = server.endpoint.replace("http:", "https:") if tls else server.endpoint
    return md.MoondreamClient(endpoint=endpoint, **({"max_retries": 0} | options))


@contextlib.contextmanager
def running_out(clock, phase, seconds, *, cls=md.APITimeoutError):
    """What is done in here ends after so many seconds, neither earlier nor later."""
    started = clock.now
    with pytest.raises(cls) as caught:
        yield caught
    assert caught.value.phase == phase
    assert f"(Timeout.{phase})" in str(caught.value)
    assert clock.now - started == pytest.approx(seconds)


async def hang(peer):
    """Never answer to TLS, so that a connection stands and yet does not."""
    await peer.until_gone()


BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(3_000_000), "image/jpeg", 8, 8)


async def uploading(client):
    await client.caption(BIG_IMAGE)


async def plainly(client):
    await client.caption(IMAGE)


async def streaming(client):
    async with client.caption(IMAGE, stream=True) as stream:
        await stream.text()


SECONDS = 45  # asyncio ends TLS after 60


# -- before the answer ----------------------------------------------------------------


@pytest.mark.parametrize("phase", ["pool", "total"])
async def test_the_wait_for_a_place_is_limited(clock, phase):
    async with played(stall, timeout=only(**{phase: SECONDS}), max_connections=2) as (
        server,
        client,
    ):
        streams = [await client.caption(IMAGE, stream=True) for _ in range(2)]
        with running_out(clock, phase, SECONDS) as caught:
            await plainly(client)
        if phase == "pool":
            assert "2 streams or calls are open, of max_connections=2" in str(caught.value)
        assert len(server.requests) == 2
        for stream in streams:
            await stream.aclose()


JSON_HEAD = head("Content-Type: application/json", "Content-Length: 1000")
HALF = JSON_HEAD + b'{"caption": "'
BEGINNINGS = {  # of answers, and what comes once a second from then on
    "half a head": (STREAM_HEAD[:20], b""),
    "informational": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "JSON": (JSON_HEAD, b" "),
    "half a JSON": (HALF, b"x"),
    "text that may be JSON": (head("Content-Type: text/plain"), b" "),
}


def playing(*steps, more=None):
    """Take a request, send bytes and wait seconds; then send `more` once a second, if any."""

    async def play(peer):
        await peer.request()
        for step in steps:
            await (peer.send(step) if isinstance(step, bytes) else asyncio.sleep(step))
        while more is not None:
            await asyncio.sleep(1)
            await peer.send(more)
        await listen(peer)

    return play


BUSY = head("Content-Length: 0", "Retry-After: 3", status="503 Busy")

# The call, what the server plays, the client's options, the limits, and how many requests are
# sent: a model that is slow once is slow twice.
RUN_OUT = {
    "connect": (plainly, hang, {"tls": True}, {"connect": SECONDS}, 0),
    "connect, in total": (streaming, hang, {"tls": True}, {"total": 7.5}, 0),
    "answer": (plainly, listen, {"max_retries": 3}, {"first_event": SECONDS}, 1),
    "stream": (streaming, listen, {"max_retries": 3}, {"first_event": SECONDS}, 1),
    "answer, in total": (plainly, listen, {"max_retries": 3}, {"total": SECONDS}, 1),
    "answer, first_event first": (plainly, listen, {}, {"first_event": 4, "total": 9}, 1),
    "stream, total first": (streaming, listen, {}, {"first_event": 9, "total": 4}, 1),
    "two tries and the wait": (streaming, playing(2, BUSY), {"max_retries": 1}, {"total": 30.5}, 2),
    **{
        name: (streaming, playing(start, more=more), {"max_retries": 3}, {"first_event": 30.5}, 1)
        for name, (start, more) in BEGINNINGS.items()
    },
    "half an answer": (plainly, playing(HALF, more=b"x"), {}, {"first_event": 30.5}, 1),
    **{
        f"answer, {name}": (methodcaller(name), listen, {}, {"first_event": 5}, 1)
        for name in ("models", "health", "server_stats")
    },
}


@pytest.mark.parametrize("row", RUN_OUT)
async def test_the_limit_that_runs_out_ends_the_call_and_is_named(clock, row):
    call, play, options, limits, sent = RUN_OUT[row]
    phase = min(limits, key=limits.get)
    async with (
        RawServer(play) as server,
        client_of(server, timeout=only(**limits), **options) as client,
    ):
        with running_out(clock, phase, limits[phase]):
            await call(client)
        assert len(server.requests) == sent


async def test_connect_limits_the_wait_for_a_machine_that_takes_no_connection(clock):
    with contextlib.ExitStack() as stack:
        listener, *others = [stack.enter_context(socket.socket()) for _ in range(6)]
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in others:  # until there is room for no more
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        limit = only(connect=SECONDS)
        async with md.MoondreamClient(endpoint=endpoint, timeout=limit, max_retries=0) as client:
            with running_out(clock, "connect", SECONDS):
                await plainly(client)


async def test_connect_begins_anew_with_each_try(clock):
    delays = []
    hooks = md.Hooks(retry=lambda event: delays.append(event.delay))
    async with (
        RawServer(hang) as server,
        client_of(server, tls=True, timeout=only(connect=5), max_retries=3, hooks=hooks) as client,
    ):
        started = clock.now
        with pytest.raises(md.APITimeoutError):
            await client.caption(IMAGE)
        assert clock.now - started == pytest.approx(4 * 5 + sum(delays))


@contextlib.asynccontextmanager
async def slow_line(play):
    """A server whose system takes in but little ahead of what is read."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        sock.bind(("127.0.0.1", 0))
        async with RawServer(play, sock=sock) as server:
            yield server


async def test_first_event_does_not_count_an_upload_that_moves(clock):
    async def play(peer):
        _, _, headers = await peer.request_head()
        left = int(headers["content-length"])
        while left:
            left -= len(await peer._reader.read(min(left, 100_000)))
            await asyncio.sleep(10)  # four hundred seconds in all
        await peer.send(whole(ANSWER))

    async with slow_line(play) as server, client_of(server, timeout=only(first_event=60)) as client:
        await uploading(client)


async def test_upload_that_stands_still_is_a_time_out_that_says_so(clock):
    async def play(peer):
        await peer.request_head()
        await asyncio.sleep(DAY)

    async with slow_line(play) as server, client_of(server, timeout=only(first_event=60)) as client:
        started = clock.now
        with pytest.raises(md.APITimeoutError, match="upload stood still") as caught:
            await uploading(client)
        assert caught.value.phase == "first_event"
        assert clock.now - started < 10 * 60


async def test_server_that_is_silent_after_a_large_upload_has_not_begun_its_answer(clock):
    async with played(listen, timeout=only(first_event=60)) as (_, client):
        with pytest.raises(md.APITimeoutError, match="answer did not begin within 60 seconds"):
            await uploading(client)


NO_END = head("Content-Length: 9000000", status="400 Bad Request") + b"x" * 200_000
SHORT_OF_9 = head("Content-Length: 9", status="500 No")
ERRORS = {
    "as much as is of use": (NO_END, {}, md.BadRequestError, 0),
    "as long as the answer": (SHORT_OF_9, {"first_event": 0.5}, md.ServerError, 0.5),
    "two seconds": (SHORT_OF_9, {"first_event": 60}, md.ServerError, 2),
    "not beyond the total": (BUSY, {"total": 2.5}, md.ServerError, 0),
}


@pytest.mark.parametrize(("sent", "limits", "cls", "seconds"), ERRORS.values(), ids=ERRORS)
async def test_an_error_takes_no_longer_than_it_is_worth(clock, sent, limits, cls, seconds):
    retries = 3 if sent is BUSY else 0
    async with played(playing(sent), timeout=only(**limits), max_retries=retries) as (
        server,
        client,
    ):
        started = clock.now
        with pytest.raises(cls):
            await plainly(client)
        assert clock.now - started == pytest.approx(seconds, abs=0.1)
        assert len(server.requests) == 1


async def test_total_of_a_picture_in_a_run_counts_from_when_it_may_start(clock):
    async def play(peer):
        while True:
            await peer.request()
            await asyncio.sleep(20)
            await peer.send(whole(ANSWER))

    async with RawServer(play) as server, client_of(server, timeout=only(total=30)) as client:
        assert [each.ok async for each in client.bulk([IMAGE] * 3, concurrency=1)] == [True] * 3


def test_end_of_a_loop_does_not_wait_for_a_client_that_it_closes(clock):
    async def ask():
        async with RawServer(answer_all) as server:
            client = client_of(server)
            await client.caption(IMAGE)
            return client

    with asyncio.Runner(loop_factory=clock.new_loop) as runner:
        client = runner.run(ask())
        ended = clock.now
    assert (clock.now, client.stats().pooled_connections) == (ended, 0)


async def test_first_event_does_not_count_the_time_in_which_nobody_waits(clock):
    async with (
        played(playing(20, STREAM_HEAD), timeout=only(first_event=30)) as (_, client),
        client.caption(IMAGE, stream=True) as stream,
    ):
        await asyncio.sleep(DAY)
        with running_out(clock, "first_event", 10):
            await anext(stream)


# -- in total -------------------------------------------------------------------------


async def test_total_counts_the_wait_for_the_pace(clock):
    async with played(answer_all, timeout=only(total=7.5), rate_limit=0.1) as (server, client):
        await plainly(client)
        with running_out(clock, "total", 7.5):
            await plainly(client)
        assert len(server.requests) == 1


async def test_total_ends_a_stream_that_was_lost_and_is_asked_for_again(clock):
    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        await asyncio.sleep(3)
        if len(server.peers) > 1:
            await peer.until_gone()

    async with played(play, timeout=only(total=10.5), max_retries=3) as (server, client):
        with running_out(clock, "total", 10.5):
            await streaming(client)
        assert len(server.peers) == 2


# -- and otherwise --------------------------------------------------------------------


async def test_without_limits_a_call_waits_for_ever(clock):
    async with played(playing(DAY, whole(ANSWER)), timeout=only()) as (_, client):
        await plainly(client)


@pytest.mark.parametrize(("seconds", "kept"), [(0.2, True), (0.3, False)])
async def test_a_complete_answer_waits_a_quarter_of_a_second_for_the_end_of_its_body(
    clock, seconds, kept
):
    async def play(peer):
        while True:
            await peer.request()
            await peer.send(STREAM_HEAD + in_chunks(*EVENTS, DONE, end=False))
            await asyncio.sleep(seconds)
            await peer.send(in_chunks())

    async with RawServer(play) as server, client_of(server, timeout=only()) as client:
        started = clock.now
        for _ in range(2):
            async with client.caption(IMAGE, stream=True) as stream:
                assert await stream.text() == TEXT
        assert clock.now - started == pytest.approx(2 * min(seconds, 0.25), abs=0.01)
        assert len(server.peers) == (1 if kept else 2)


@pytest.mark.parametrize("also", ["cancelled", "failed"])
async def test_deadline_that_runs_out_hides_nothing_else_that_ends_the_call(also):
    pool = types.SimpleNamespace(loop=asyncio.get_running_loop())
    task = asyncio.current_task()

    async def ends():
        with CallDeadline(pool, only(total=1), None, None) as deadline:
            deadline.expired()
            if also == "failed":
                raise ValueError
            task.cancel()
            await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError if also == "cancelled" else ValueError):
        await ends()
    while task.cancelling():
        task.uncancel()
