"""Every way to leave a stream, of every kind, wherever it is: nothing stays behind.

Each cell of the table opens a stream over a socket, reads it up to a place, and leaves it. Then its
connection is closed or back in the pool, its slot is free, the hooks have heard of one end with the
right outcome, the text that was read is kept, no task is left, reading on says why it can't, the
next call works, and the stream is freed by reference counting: the cyclic collector is off.

`test_owner.py` says whose a stream is, and `test_everywhere.py` leaves calls of all other kinds,
too, at each of their awaits.
"""

import asyncio
import contextlib
import gc
import itertools
import re
import sys
import threading
import weakref
from typing import Any, NamedTuple

import anyio
import pytest
from canned import IMAGE, client_of, played, rounds
from raw_server import RawServer, event, stall
from scenes import (
    BETWEEN_READS,
    IN_A_READ,
    ITERATORS,
    KINDS,
    OPEN,
    RELAYS,
    STREAMS,
    Scene,
    caption,
    chat,
    query,
    segment,
    tasks_besides,
)
from sources import read_all

import moondream_async as md
from moondream_async._stream.relay import EventStream, Relay

SHORT = 0.01  # seconds until somebody loses patience; nothing else happens meanwhile


@pytest.fixture(autouse=True)
def _no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


# -- ways: it is read to its end, or somebody closes it ----------------------------------------


async def no_pause():
    pass


async def fail():
    raise ZeroDivisionError


async def for_ever():
    await asyncio.Event().wait()


async def read_to_its_end(scene):
    await scene.read_up_to_here()
    await read_all(scene.held)
    await scene.stream.text()


async def block_is_broken_out_of(scene):
    async with scene.stream:
        await scene.loop(no_pause)


async def block_raises(scene):
    with pytest.raises(ZeroDivisionError):
        async with scene.stream:
            await scene.loop(fail)


async def block_is_cancelled(scene):
    with anyio.CancelScope() as scope:
        async with scene.stream:
            await scene.read_up_to_here()
            scope.cancel()
            await anyio.sleep_forever()


async def aclose(scene):
    await scene.stream.aclose()
    await scene.stream.aclose()


async def aclose_what_is_read(scene):
    await scene.held.aclose()
    await scene.held.aclose()


async def close_in_another_thread(scene):
    thread = threading.Thread(target=scene.held.close)
    thread.start()
    thread.join()


async def supersede(scene):
    scene.stream.supersede()


async def close_the_client(scene):
    """What has arrived before can still be read."""
    await scene.client.aclose()
    scene.reads_on = True


def first(close):
    """It is read up to the place and then closed."""

    async def leave(scene):
        await scene.read_up_to_here()
        await close(scene)

    return leave


def under_its_reader(close):
    """It is closed while another task waits for text."""

    async def leave(scene):
        reader = asyncio.ensure_future(scene.loop())
        await scene.until_there()
        await close(scene)
        await asyncio.wait([reader])
        scene.kept.append(reader)
        if close is supersede or isinstance(scene.held, EventStream):
            assert reader.exception() is None
        else:
            assert isinstance(reader.exception(), md.ClientClosedError)
            assert "cancelled" not in str(reader.exception())

    return leave


# -- ways: its reader is cancelled ---------------------------------------------------------------


async def task(scene, reading):
    reader = asyncio.ensure_future(reading)
    await scene.until_there()
    reader.cancel()
    await asyncio.wait([reader])
    scene.kept.append(reader)


async def another_task(scene, reading):
    """After it was read here."""
    reading.close()
    await scene.read_up_to_here()
    scene.there.set()
    await task(scene, read_all(scene.held))


async def cancel_scope(scene, reading):
    with anyio.CancelScope() as scope:
        scene.when_there(scope.cancel)
        await reading


async def timeout(scene, reading):
    now = asyncio.get_running_loop().time
    async with asyncio.timeout(600) as limit:
        scene.when_there(lambda: limit.reschedule(now()))
        await reading


async def wait_for(scene, reading):
    await asyncio.wait_for(reading, SHORT)


async def task_group(scene, reading):
    async def fail():
        await scene.until_there()
        raise ZeroDivisionError

    async with anyio.create_task_group() as group:
        group.start_soon(fail)
        await reading


async def child_of_a_task_group(scene, reading):
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: reading)
        await scene.until_there()
        group.cancel_scope.cancel()


RAISES = {timeout: TimeoutError, wait_for: TimeoutError, task_group: ExceptionGroup}
CANCELLING = [task, timeout, cancel_scope, task_group, child_of_a_task_group]


def cancelled(cancel, pause=None):
    """What is raised is kept, and with it the frames that were left."""

    async def leave(scene):
        scene.is_freed &= cancel in (task, another_task)
        if cancel in RAISES:
            with pytest.raises(RAISES[cancel]) as caught:
                await cancel(scene, scene.loop(pause))
            scene.kept.append(caught)
        else:
            await cancel(scene, scene.loop(pause))

    return leave


# -- ways: it is dropped -------------------------------------------------------------------------


DROPPED = "Stream was dropped before its end, opened at "


async def drop(scene):
    await scene.read_up_to_here()
    silent = scene.is_relay or scene.is_complete
    with contextlib.nullcontext() if silent else pytest.warns(ResourceWarning, match=DROPPED):
        scene.stream = None
        await rounds(5)
        assert not scene.gone.is_set()  # what is read keeps its stream
        scene.held = None
        await rounds(10)


async def drop_in_another_thread(scene):
    await scene.read_up_to_here()
    with pytest.warns(ResourceWarning, match=DROPPED):
        await asyncio.to_thread(scene.let_go)
    await rounds(10)


# -- ways: the server breaks off -----------------------------------------------------------------


async def read_on(scene):
    """Read until it breaks."""
    await scene.read_up_to_here()
    scene.there.set()
    error = scene.way.error
    if isinstance(scene.held, EventStream):
        *_, last = await read_all(scene.held)
        said = f'event: error\ndata: {{"error":{{"type":"{error.__name__}"'
        assert last.startswith(said.encode())
        return
    with pytest.raises(error, match=scene.way.says) as caught:
        await read_all(scene.held)
    assert caught.value.partial == scene.given
    del caught  # or else its frames, of which this is one, keep the stream


# -- the table -----------------------------------------------------------------------------------


class Way(NamedTuple):
    leave: Any
    kinds: list = STREAMS
    where: list = OPEN
    error: type | None = md.ClientClosedError  # of who reads on
    says: str = "closed"
    outcome: str = "abandoned"
    breaks: Any = None  # what the server sends at last, and what it does then

    @property
    def reads_all(self):
        return self.leave is read_to_its_end


def server(*breaks, where=(*IN_A_READ[:2], "in-a-packet"), outcome="interrupted", error, says):
    return Way(read_on, [*STREAMS[::2], *RELAYS], where, error, says, outcome, breaks)


CANCELLED = {"says": r"cancelled.* Timeout\(idle=.*asyncio\.wait", "outcome": "cancelled"}
INTERRUPTED = {"error": md.StreamInterruptedError, "says": "ended before the answer"}
STALLED = {"error": md.StreamStalledError, "says": "Nothing came for 0.01 seconds"}
REPORTED = {"error": md.StreamServerError, "says": "boom", "outcome": "failed"}
NONSENSE = {"error": md.StreamProtocolError, "says": "JSON object: odd", "outcome": "failed"}

WAYS = {
    "read-to-its-end": Way(read_to_its_end, [*KINDS], BETWEEN_READS[2:4], None),
    "break": Way(block_is_broken_out_of, where=BETWEEN_READS),
    "raise": Way(block_raises, where=BETWEEN_READS),
    "block-is-cancelled": Way(block_is_cancelled),
    "aclose": Way(first(aclose), says="closed before its end"),
    "aclose-what-is-read": Way(first(aclose_what_is_read), ITERATORS),
    "close-in-another-thread": Way(first(close_in_another_thread), ITERATORS),
    "supersede": Way(first(supersede), error=None),
    "close-the-client": Way(first(close_the_client)),
    "aclose-under-its-reader": Way(under_its_reader(aclose), [*KINDS], IN_A_READ),
    "aclose-what-is-read-under-its-reader": Way(
        under_its_reader(aclose_what_is_read), ITERATORS, IN_A_READ
    ),
    "supersede-under-its-reader": Way(under_its_reader(supersede), [*KINDS], IN_A_READ, error=None),
    "close-the-client-under-its-reader": Way(
        under_its_reader(close_the_client), [*KINDS], IN_A_READ
    ),
    "another-task-is-cancelled": Way(cancelled(another_task), where=IN_A_READ[:2], **CANCELLED),
    "wait_for": Way(cancelled(wait_for), [*KINDS], IN_A_READ[:1], **CANCELLED),
    **{
        f"{cancel.__name__}-in-a-read": Way(
            cancelled(cancel),
            [*KINDS] if cancel in (task, timeout) else ["caption", "generator"],
            IN_A_READ,
            **CANCELLED,
        )
        for cancel in CANCELLING
    },
    **{
        f"{cancel.__name__}-between-reads": Way(
            cancelled(cancel, for_ever),
            [*KINDS] if cancel is task else STREAMS if cancel is timeout else STREAMS[:1],
            BETWEEN_READS,
            **CANCELLED,
        )
        for cancel in CANCELLING
    },
    "drop": Way(drop, [*KINDS]),
    "drop-in-another-thread": Way(drop_in_another_thread, where=OPEN[:3]),
    "server-ends": server(b"", "end", **INTERRUPTED),
    "server-is-cut": server(b"", "cut", **INTERRUPTED),
    "server-ends-in-an-event": server(b'data: {"chunk": "lost', "end", **INTERRUPTED),
    "server-resets": server(b"", "reset", where=IN_A_READ[:2], **INTERRUPTED),
    "server-is-silent": server(b"", "silence", where=IN_A_READ[1:2], **STALLED),
    "server-sends-an-error": server(event(error="boom"), "silence", **REPORTED),
    "server-sends-nonsense": server(b"data: odd\n\n", "silence", **NONSENSE),
}
UVLOOP = [
    ("task-in-a-read", "caption", "between-packets"),
    ("timeout-in-a-read", "generator", "before-the-first"),
    ("cancel_scope-in-a-read", "caption", "between-packets"),
    ("task-between-reads", "generator", "between-packets"),
    ("timeout-between-reads", "caption", "in-a-packet"),
    ("child_of_a_task_group-between-reads", "caption", "between-packets"),
    ("aclose-under-its-reader", "query.sse", "between-packets"),
    ("server-is-cut", "caption", "between-packets"),
]


def is_a_cell(kind, where):
    """A relay takes each packet at once, so that it is nowhere within one."""
    return kind not in RELAYS or where not in ("in-a-packet", "complete-unread")


def cells():
    """Yield a cell for any two of a way, a kind and a place that have not met yet."""
    met = set()
    for turn, (name, way) in enumerate(WAYS.items()):
        for step, (number, kind) in itertools.product(range(len(way.where)), enumerate(way.kinds)):
            where = way.where[(turn + step + number) % len(way.where)]
            pairs = {(name, kind), (name, where), (kind, where)}
            if is_a_cell(kind, where) and not pairs <= met:
                met |= pairs
                yield pytest.param(way, kind, where, "asyncio", id=f"{name}-{kind}-{where}")
    for name, kind, where in UVLOOP:
        loop = "asyncio", {"use_uvloop": True}
        yield pytest.param(WAYS[name], kind, where, loop, id=f"{name}-{kind}-{where}-uvloop")


@pytest.mark.parametrize(("way", "kind", "where", "anyio_backend"), [*cells()])
async def test_nothing_is_left_behind(way, kind, where):
    scene = Scene(way, kind, where)
    options = {
        "max_connections": 1,
        "max_retries": int(scene.is_tried_again),
        "hooks": md.Hooks(end=lambda end: scene.ends.append((end.outcome, end.completed))),
        "timeout": md.Timeout(idle=SHORT if way.error is md.StreamStalledError else 60),
    }
    async with played(scene.play, **options) as (scene.server, scene.client):
        scene.stream = await scene.kind.ask(scene.client)
        scene.held = scene.kind.hold(scene.stream)
        freed = weakref.ref(scene.stream)

        await way.leave(scene)

        await rounds(10)
        assert tasks_besides(scene.server) == set()
        if scene.stream is not None:
            await assert_over(scene)
        scene.let_go()
        await rounds(5)
        assert freed() is None or not scene.is_freed
        stats = scene.client.stats()
        assert (stats.open_streams, stats.waiting_calls) == (0, 0)
        [end] = scene.ends
        outcome = "complete" if scene.is_complete else way.outcome
        if outcome == "cancelled" and scene.is_relay:
            outcome = "abandoned"  # as every browser does it
        assert end == (outcome, scene.is_complete)
        if not scene.is_complete:
            await scene.gone.wait()
        if not scene.client.closed:
            assert (await scene.client.caption(IMAGE)).caption
            came_back = scene.is_complete
            assert len(scene.server.peers) == 2 - came_back + scene.is_tried_again
    await scene.server.until_idle()


async def assert_over(scene):
    """What was handed out is kept, and who reads on is told why there is no more."""
    way, stream = scene.way, scene.stream
    if scene.reads_on:
        with contextlib.suppress(md.MoondreamError):
            await stream.text()
    if scene.where.sent is not None:
        assert stream.text_so_far == scene.given
    readers = [stream, stream.chunk, stream.events, stream.chunk_bytes()]
    if way.error is None or scene.is_over:
        for reader in readers:
            assert await read_all(reader) == []
        assert await stream.text() == stream.text_so_far
    else:
        for reading in (*map(anext, readers), stream.text(), stream.result()):
            with pytest.raises(way.error, match=way.says) as caught:
                await reading
            if way.breaks:
                assert caught.value.partial == scene.given
            del caught
    if isinstance(scene.held, Relay):
        with contextlib.suppress(way.error or StopAsyncIteration):
            assert b"chunk" not in b"".join(await read_all(scene.held))
    await stream.aclose()


# -- more of its end -----------------------------------------------------------------------------


async def test_the_warning_names_the_line_that_opened_the_stream():
    async with played(stall) as (_, client):
        for ask in (caption, query, segment, chat):
            code = ask.__code__
            here = re.escape(f"{DROPPED}{code.co_filename}:{code.co_firstlineno + 1}: ")
            stream = await ask(client)

            with pytest.warns(ResourceWarning, match=here):
                del stream


async def test_dropped_stream_and_client_are_closed_where_warnings_are_errors(monkeypatch):
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: raised.append(type(args.exc_value)))
    async with RawServer(stall) as server:
        client = client_of(server)
        stream = await client.caption(IMAGE, stream=True)
        await anext(stream)
        del client, stream
        await server.until_idle()
    assert raised == [ResourceWarning] * 2
