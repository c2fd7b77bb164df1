"""Streams of every kind over a socket, each read up to some place, and all that is seen of them."""

import asyncio
from typing import Any, NamedTuple

from canned import IMAGE, rounds
from raw_server import DONE, EVENTS, STREAM_HEAD, WORDS, answer_all, event, in_chunks

from moondream_async._stream.relay import HEARTBEAT

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
            await self.break_off(peer, packet, *self.way.breaks)
            return
        if packet:
            await peer.send(in_chunks(packet, end=self.is_complete))
        if self.is_complete:
            await answer_all(peer)
        await peer.until_gone()

    async def break_off(self, peer, packet, more, then):
        """Once all is read that was sent; or else in the same packet."""
        if self.where.read == self.where.sent:
            if packet:
                await peer.send(in_chunks(packet, end=False))
            await self.there.wait()
            packet = b""
        if then == "reset":
            peer.reset()
            return
        said = packet + more
        await peer.send(in_chunks(*[said] * bool(said), end=then == "end"))
        if then == "silence":
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
        whole = self.is_relay or self.reads_on or self.way.reads_all
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
