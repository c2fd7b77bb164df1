"""Every way to leave a stream, of every kind, wherever it is: nothing stays behind.

Each cell of the table opens a stream over a socket, reads it up to a place, and leaves it. Then its
connection is closed or back in the pool, its slot is free, the hooks have heard of one end with the
right outcome, the text that was read is kept, no task is left, reading on says why it can't, the
next call works, and the stream is freed by reference counting: the cyclic collector is off.

`test_everywhere.py` leaves calls of all other kinds, too, at each of their awaits.
"""

import asyncio
import contextlib
import copy
import gc
import itertools
import pickle
import re
import sys
import threading
import weakref
from typing import Any, NamedTuple

import anyio
import pytest
from canned import IMAGE, client_of, played, rounds
from decoding import sse
from raw_server import (
    DONE,
    EVENTS,
    STREAM_HEAD,
    WORDS,
    RawServer,
    answer_all,
    event,
    in_chunks,
    stall,
)
from sources import DONE as HERON_DONE
from sources import HERON, Source, opened, read_all, until_idle
from sources import TEXT as HERON_TEXT

import moondream_async as md
from moondream_async._protocol.decoders import decoder_for
from moondream_async._stream.kinds import CaptionStream
from moondream_async._stream.opening import Opening
from moondream_async._stream.relay import HEARTBEAT, EventStream, Relay

SHORT = 0.01  # seconds until somebody loses patience; nothing else happens meanwhile


@pytest.fixture(autouse=True)
def _no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


# -- which stream, and what is read of it --------------------------------------------------------


class Kind(NamedTuple):
    ask: Any  # a client, for a stream
    hold: Any  # of the stream, what is read
    events: tuple = (*EVENTS, DONE)


async def passed_on(stream):
    """As web backends are written."""
    async for piece in stream:
        yield piece


def caption(client):
    return client.caption(IMAGE, stream=True)


def query(client):
    return client.query(IMAGE, "What?", stream=True)


def segment(client):
    return client.segment(IMAGE, "cat", stream=True)


def chat(client):
    return client.chat([{"role": "user", "content": "What?"}], stream=True)


OUTLINE = (
    *[event(word, type="path_delta") for word in WORDS],
    event(type="final", completed=True, path="M 0 0 Z"),
)
TURN = (*[event(choices=[{"delta": {"content": word}}]) for word in WORDS], b"data: [DONE]\n\n")
KINDS = {
    "caption": Kind(caption, lambda stream: stream),
    "query.chunk": Kind(query, lambda stream: stream.chunk),
    "chat.events": Kind(chat, lambda stream: stream.events, TURN),
    "segment": Kind(segment, lambda stream: stream, OUTLINE),
    "generator": Kind(caption, passed_on),
    "query.sse": Kind(query, lambda stream: stream.sse()),
    "segment.sse-no-heartbeat": Kind(segment, lambda stream: stream.sse(heartbeat=None), OUTLINE),
    "chat.chunk_bytes": Kind(chat, lambda stream: stream.chunk_bytes(), TURN),
}
STREAMS = [*KINDS][:4]
RELAYS = [*KINDS][5:]
ITERATORS = ["query.chunk", "chat.events", *RELAYS]


# -- where ---------------------------------------------------------------------------------------


class Where(NamedTuple):
    sent: int | None  # events, in one packet; for ever where it is None
    read: int


WHERE = {
    "before-the-first": Where(0, 0),
    "between-packets": Where(1, 1),
    "in-a-packet": Where(3, 1),
    "after-the-last": Where(4, 3),
    "complete-unread": Where(4, 1),
    "in-a-flood": Where(None, 1),
    "between-attempts": Where(0, 0),
}
OPEN = [*WHERE][:6]
IN_A_READ = ["before-the-first", "between-packets", "between-attempts"]
BETWEEN_READS = [*WHERE][1:6]


class Scene:
    """A stream that is read up to a place, its server, and what is heard of it."""

    def __init__(self, way, kind, where):
        self.way, self.kind, self.where = way, KINDS[kind], WHERE[where]
        self.is_relay = kind in RELAYS
        self.is_tried_again = where == "between-attempts"
        self.ends = []
        self.reads_on = bool(way.breaks)  # whether what has arrived is still handed out
        self.kept = []  # what may keep frames alive
        self.is_freed = where != "between-attempts"  # asyncio's and anyio's limits leave cycles
        self.stream = self.held = None
        self.gone, self.there = asyncio.Event(), asyncio.Event()

    # -- the server

    async def play(self, peer):
        number = self.server.peers.index(peer) - self.is_tried_again
        if number < 0:  # the attempt that is lost before its first event
            await peer.request()
            await peer.send(STREAM_HEAD)
            return
        if number:
            await answer_all(peer)
        await peer.request()
        try:
            await self.answer(peer, self.kind.events)
        finally:
            self.gone.set()

    async def answer(self, peer, events):
        if self.is_tried_again:
            self.there.set()
            await peer.until_gone()
        await peer.send(STREAM_HEAD)
        flood = in_chunks(b"".join(events[:3]) * 100, end=False)
        while self.where.sent is None:
            await peer.send(flood)
        packet = b"".join(events[: self.where.sent])
        if self.way.breaks:
            await self.way.breaks(self, peer, packet)
            return
        if packet:
            await peer.send(in_chunks(packet, end=self.is_complete))
        if self.is_complete:
            await answer_all(peer)
        await peer.until_gone()

    # -- the reader

    @property
    def count(self):
        """How often it is read up to the place."""
        return min(self.where.read, 1) if self.is_relay else self.where.read

    async def read_up_to_here(self):
        count = self.count
        while count:
            count -= await anext(self.held) != HEARTBEAT

    async def loop(self, pause=None):
        """Read up to the place and on; `pause` is awaited there, between two reads."""
        count = self.count
        if not count and not self.is_tried_again:
            self.there.set()
        async for piece in self.held:
            if piece == HEARTBEAT:
                continue
            count -= 1
            if not count:
                self.there.set()
                if pause:
                    await pause()
                    break

    async def until_there(self):
        await self.there.wait()
        await rounds(20)  # until it waits

    def when_there(self, act):
        async def wait():
            await self.until_there()
            act()

        return asyncio.ensure_future(wait())

    # -- what there is to see

    @property
    def given(self):
        """The text that was handed out."""
        whole = self.is_relay or self.reads_on or self.way.leave is read_to_its_end
        return "".join(WORDS[: self.where.sent if whole else self.where.read])

    @property
    def is_complete(self):
        return self.where.sent == 4

    @property
    def is_over(self):
        """Whether all of the answer was handed out."""
        whole = self.is_relay or self.reads_on or self.where.read == 3
        return self.is_complete and whole

    def let_go(self):
        self.stream = self.held = None
        self.kept.clear()


def tasks_besides(server):
    """All tasks but this one, the server's, and those of anyio's test runner."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()} - server.tasks
    return {task for task in tasks if "TestRunner" not in task.get_coro().__qualname__}


# -- ways: it is read to its end, or somebody closes it ----------------------------------------


async def no_pause():
    pass


async def fail():
    raise ZeroDivisionError


async def read_to_its_end(scene):
    await scene.read_up_to_here()
    await read_all(scene.held)
    await scene.stream.text()


async def block_ends(scene):
    async with scene.stream:
        await scene.read_up_to_here()


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


def first(leave):
    """It is read up to the place and then left."""

    async def read_and_leave(scene):
        await scene.read_up_to_here()
        await leave(scene)

    read_and_leave.__name__ = leave.__name__
    return read_and_leave


async def aclose(scene):
    await scene.stream.aclose()
    await scene.stream.aclose()


async def aclose_in_another_task(scene):
    await asyncio.create_task(scene.stream.aclose())


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


async def leave_the_client(scene):
    async with scene.client:
        pass
    scene.reads_on = True


# -- ways: its reader is cancelled ---------------------------------------------------------------


async def task(scene, reading):
    reader = asyncio.ensure_future(reading)
    await scene.until_there()
    reader.cancel()
    await asyncio.wait([reader])
    scene.kept.append(reader)


async def another_task(scene, reading):
    """After it was read here."""
    await scene.read_up_to_here()
    scene.there.clear()
    reader = asyncio.ensure_future(read_all(scene.held))
    await rounds(20)
    reader.cancel()
    await asyncio.wait([reader])
    scene.kept.append(reader)
    reading.close()


async def cancel_scope(scene, reading):
    with anyio.CancelScope() as scope:
        scene.when_there(scope.cancel)
        await reading


async def move_on_after(scene, reading):
    with anyio.move_on_after(600) as scope:
        scene.when_there(lambda: setattr(scope, "deadline", anyio.current_time()))
        await reading


async def until_timeout(scene, reading):
    now = asyncio.get_running_loop().time
    async with asyncio.timeout(600) as limit:
        scene.when_there(lambda: limit.reschedule(now()))
        await reading


async def timeout(scene, reading):
    with pytest.raises(TimeoutError) as caught:
        await until_timeout(scene, reading)
    scene.kept.append(caught)


async def wait_for(scene, reading):
    with pytest.raises(TimeoutError) as caught:
        await asyncio.wait_for(reading, SHORT)
    scene.kept.append(caught)


async def beside_one_that_fails(scene, reading):
    async def fail():
        await scene.until_there()
        raise ZeroDivisionError

    async with anyio.create_task_group() as group:
        group.start_soon(fail)
        await reading


async def task_group(scene, reading):
    with pytest.raises(ExceptionGroup) as caught:
        await beside_one_that_fails(scene, reading)
    scene.kept.append(caught)


async def child_of_a_task_group(scene, reading):
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: reading)
        await scene.until_there()
        group.cancel_scope.cancel()


CANCELLING = [task, timeout, cancel_scope, move_on_after, task_group, child_of_a_task_group]


def cancelled(cancel, pause=None):
    async def leave(scene):
        scene.is_freed &= cancel in (task, another_task)
        await cancel(scene, scene.loop(pause))

    return leave


async def for_ever():
    await asyncio.Event().wait()


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
        elif close is not aclose_what_is_read or scene.held is not None:
            assert isinstance(reader.exception(), md.ClientClosedError)
            assert "cancelled" not in str(reader.exception())

    return leave


# -- ways: it is dropped -------------------------------------------------------------------------


async def drop(scene):
    await scene.read_up_to_here()
    with contextlib.ExitStack() as stack:
        if not scene.is_relay and not scene.is_complete:
            said = rf"Stream was dropped before its end, opened at {re.escape(__file__)}:\d"
            stack.enter_context(pytest.warns(ResourceWarning, match=said))
        scene.stream = None
        await rounds(5)
        assert not scene.gone.is_set()  # what is read keeps its stream
        scene.held = None
        await rounds(10)


async def drop_in_another_thread(scene):
    await scene.read_up_to_here()
    with pytest.warns(ResourceWarning, match="was dropped before its end"):
        await asyncio.to_thread(scene.let_go)
    await rounds(10)


# -- ways: the server breaks off -----------------------------------------------------------------


def breaking(act, *, apart=True):
    async def break_off(scene, peer, events):
        if apart and events:
            await peer.send(in_chunks(events, end=False))
            events = b""
        if apart:
            await scene.there.wait()
        await act(peer, events)

    return break_off


async def end(peer, events):
    await peer.send(in_chunks(*[events] * bool(events)))


async def cut(peer, events):
    await peer.send(in_chunks(*[events] * bool(events), end=False))


async def reset(peer, events):
    peer.reset()


async def half_an_event(peer, events):
    await peer.send(in_chunks(events + b'data: {"chunk": "lost'))


async def error_event(peer, events):
    await peer.send(in_chunks(events + event(error="boom"), end=False))
    await peer.until_gone()


async def nonsense(peer, events):
    await peer.send(in_chunks(events + b"data: odd\n\n", end=False))
    await peer.until_gone()


async def silence(peer, events):
    await peer.until_gone()


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
    says: str = "closed before its end"
    outcome: str = "abandoned"
    breaks: Any = None  # by the server


CANCELLED = {"says": r"cancelled.* Timeout\(idle=.*asyncio\.wait", "outcome": "cancelled"}
INTERRUPTED = {
    "error": md.StreamInterruptedError,
    "says": "ended before the answer",
    "outcome": "interrupted",
}
SERVER_ERROR = {"error": md.StreamServerError, "says": "boom", "outcome": "failed"}
PROTOCOL_ERROR = {"error": md.StreamProtocolError, "says": "JSON object: odd", "outcome": "failed"}
BREAKS = {
    "ends": (end, INTERRUPTED),
    "is-cut": (cut, INTERRUPTED),
    "ends-in-an-event": (half_an_event, INTERRUPTED),
    "sends-an-error": (error_event, SERVER_ERROR),
    "sends-nonsense": (nonsense, PROTOCOL_ERROR),
}
AT_ONCE = ["caption", "chat.events", "query.sse", "chat.chunk_bytes"]

WAYS = (
    {
        "read-to-its-end": Way(read_to_its_end, [*KINDS], BETWEEN_READS[2:4], None),
        "block-ends": Way(block_ends),
        "break": Way(block_is_broken_out_of, where=BETWEEN_READS),
        "raise": Way(block_raises, where=BETWEEN_READS),
        "block-is-cancelled": Way(block_is_cancelled),
        "aclose": Way(first(aclose)),
        "aclose-in-another-task": Way(first(aclose_in_another_task)),
        "aclose-what-is-read": Way(first(aclose_what_is_read), ITERATORS),
        "close-in-another-thread": Way(first(close_in_another_thread), ITERATORS),
        "supersede": Way(first(supersede), error=None),
        "close-the-client": Way(first(close_the_client), says="closed"),
        "leave-the-client": Way(first(leave_the_client), says="closed"),
        "drop": Way(drop, [*KINDS]),
        "drop-in-another-thread": Way(drop_in_another_thread, where=OPEN[:3]),
        "another-task-is-cancelled": Way(cancelled(another_task), where=IN_A_READ[:2], **CANCELLED),
        "wait_for": Way(cancelled(wait_for), [*KINDS], IN_A_READ[:1], **CANCELLED),
        "server-resets": Way(
            read_on, [*KINDS], IN_A_READ[:2], breaks=breaking(reset), **INTERRUPTED
        ),
        "server-is-silent": Way(
            read_on,
            [*KINDS],
            IN_A_READ[1:2],
            md.StreamStalledError,
            "Nothing came for 0.01 seconds",
            "interrupted",
            breaking(silence),
        ),
    }
    | {
        f"{cancel.__name__}-in-a-read": Way(
            cancelled(cancel),
            [*KINDS] if cancel in (task, timeout) else ["caption", "generator"],
            IN_A_READ,
            **CANCELLED,
        )
        for cancel in CANCELLING
    }
    | {
        f"{cancel.__name__}-between-reads": Way(
            cancelled(cancel, for_ever),
            [*KINDS] if cancel is task else STREAMS if cancel is timeout else STREAMS[:1],
            BETWEEN_READS,
            **CANCELLED,
        )
        for cancel in CANCELLING
    }
    | {
        f"{close.__name__}-under-its-reader": Way(
            under_its_reader(close),
            ITERATORS if close is aclose_what_is_read else [*KINDS],
            IN_A_READ,
            None if close is supersede else md.ClientClosedError,
            "closed",
        )
        for close in (aclose, aclose_what_is_read, supersede, close_the_client)
    }
    | {
        f"server-{name}{'' if apart else '-at-once'}": Way(
            read_on,
            [*KINDS] if apart else AT_ONCE,
            IN_A_READ[:2] + BETWEEN_READS[1:2] if apart else BETWEEN_READS[:2],
            breaks=breaking(act, apart=apart),
            **what,
        )
        for name, (act, what) in BREAKS.items()
        for apart in (True, False)
    }
)
UVLOOP = [
    ("task-in-a-read", "caption", "between-packets"),
    ("timeout-in-a-read", "generator", "before-the-first"),
    ("cancel_scope-in-a-read", "caption", "between-packets"),
    ("task_group-in-a-read", "query.chunk", "between-packets"),
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
    """Yield all cells; those are fast that bring two of way, kind and place together first."""
    seen = set()
    for name, kind, where in itertools.product(WAYS, KINDS, WHERE):
        if kind in WAYS[name].kinds and where in WAYS[name].where and is_a_cell(kind, where):
            pairs = {(name, kind), (name, where), (kind, where)}
            marks = pytest.mark.slow if pairs <= seen else ()
            seen |= pairs
            cell = f"{name}-{kind}-{where}"
            yield pytest.param(WAYS[name], kind, where, "asyncio", id=cell, marks=marks)
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


# -- whose it is ---------------------------------------------------------------------------------


async def test_the_owner_is_the_task_that_read_last():
    source = Source(sse(HERON[0]))
    stream = opened(source)

    async def read_one():
        await anext(stream)
        await for_ever()

    first = asyncio.create_task(read_one())
    await until_idle()
    source.send(sse(HERON[1]))
    assert await anext(stream) == "heron "
    first.cancel()
    await asyncio.wait([first])
    await until_idle()

    assert not source.closed
    source.send(sse(HERON[2], HERON_DONE))
    assert await stream.text() == HERON_TEXT


async def read_one(stream):
    await anext(stream)


async def read_one_and_fail(stream):
    await anext(stream)
    raise ZeroDivisionError


async def be_refused_and_cancelled(stream):
    """Since another task is reading."""
    with pytest.raises(md.MoondreamError, match="Another task is already reading"):
        await anext(stream)
    asyncio.current_task().cancel()
    await for_ever()


async def open_it_and_be_cancelled(stream):
    asyncio.current_task().cancel()
    await for_ever()


HARMLESS = [read_one, read_one_and_fail, open_it_and_be_cancelled, be_refused_and_cancelled]


@pytest.mark.parametrize("touch", HARMLESS, ids=lambda each: each.__name__)
async def test_a_task_that_ends_leaves_the_stream_to_who_reads_on(touch):
    streams, source = [], Source(sse(HERON[0]))

    async def other():
        streams.append(opened(source))
        if touch is be_refused_and_cancelled:
            streams.append(asyncio.create_task(streams[0].text()))
            await until_idle()
        await touch(streams[0])

    await asyncio.wait([reader := asyncio.create_task(other())])
    await until_idle()

    assert reader.cancelled() or isinstance(reader.exception(), ZeroDivisionError | None)
    assert not source.closed
    source.send(sse(*HERON[1:], HERON_DONE))
    reading = streams[1] if streams[1:] else streams[0].text()
    assert await reading == HERON_TEXT


async def test_waiting_with_a_limit_without_cancelling_loses_nothing():
    """What the error that a cancelled reader meets speaks of."""
    source = Source()
    reader = asyncio.create_task(opened(source).text())

    done, _ = await asyncio.wait([reader], timeout=SHORT)

    assert not done
    source.send(sse(*HERON, HERON_DONE))
    assert await reader == HERON_TEXT


@pytest.mark.parametrize("hold", [kind.hold for kind in KINDS.values()], ids=KINDS)
async def test_a_task_that_reads_many_streams_is_not_reminded_of_each(hold):
    me = asyncio.current_task()
    before = [*(me._callbacks or ())]
    for _ in range(3):
        await read_all(hold(opened(Source(sse(*HERON, HERON_DONE)))))

    assert [*(me._callbacks or ())] == before


def test_an_answer_that_is_there_is_read_without_a_task_and_without_a_loop():
    decoder = decoder_for("caption")
    events = decoder.body(b'{"caption": "A heron."}')
    reading = CaptionStream(Opening(decoder, events=events)).text()

    with pytest.raises(StopIteration) as caught:
        reading.send(None)

    assert caught.value.value == "A heron."


# -- more of its end -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_a_stream_can_not_be_copied(kind):
    source = Source(sse(*HERON, HERON_DONE))
    stream = opened(source)
    original = kind.hold(stream)

    for double in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"can't be copied|cannot pickle"):
            double(original)

    assert not source.closed
    assert await stream.text() == HERON_TEXT


@pytest.mark.parametrize("ask", [caption, query, segment, chat])
async def test_the_warning_names_the_line_that_opened_the_stream(ask):
    here = ask.__code__.co_firstlineno + 1
    async with played(stall) as (_, client):
        stream = await ask(client)

        with pytest.warns(ResourceWarning, match=f"opened at {re.escape(__file__)}:{here}: "):
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


async def test_two_hundred_streams_cancelled_at_once_leave_nothing():
    async def read():
        async with client.caption(IMAGE, stream=True) as stream:
            await anext(stream)
            are_open.append(stream)
            await anext(stream)

    are_open = []
    async with played(stall, max_connections=200) as (server, client):
        tasks = [asyncio.ensure_future(read()) for _ in range(200)]
        while len(are_open) < 200:
            await rounds(1)
        for each in tasks:
            each.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {asyncio.CancelledError}
        await server.until_idle()
        assert client.stats().open_streams == 0


async def test_closing_a_complete_stream_can_be_cancelled_and_closes_all_the_same():
    class Slow(Source):
        async def finish(self):
            await anyio.sleep_forever()

    source = Slow(sse(*HERON, HERON_DONE))
    stream = opened(source)
    await anext(stream)
    with anyio.move_on_after(SHORT):
        await stream.aclose()

    assert source.closed
