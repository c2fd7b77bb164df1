"""Every kind of call, left at each of its awaits: cancelled, or its client closed.

The call is made again and again, each time struck one await later, until it ends before that: its
first attempt is refused, its second is lost, and its third is answered. Each time no task is left,
the hooks have heard of one end for each call that they heard of, nothing holds a slot, the server
has seen the connections end, and the next call works.
"""

import asyncio
import itertools
import threading
import types
from collections import Counter

import anyio
import pytest
from canned import IMAGE, client_of, rounds
from raw_server import (
    ANSWER,
    DONE,
    EVENTS,
    STREAM_HEAD,
    TEXT,
    WORDS,
    RawServer,
    head,
    in_chunks,
    whole,
)
from scenes import OUTLINE, TURN, caption, chat, segment, tasks_besides

import moondream_async as md
from moondream_async.simulator import SAMPLE_IMAGE

pytestmark = pytest.mark.usefixtures("silence")

BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(1_000_000), "image/jpeg", 8, 8)


# -- a server whose every piece has to be waited for ---------------------------------------------

MESSAGE = {"role": "assistant", "content": "A cat"}
ANSWERS = {  # by the last part of the address: plain, streamed
    "caption": (ANSWER, (*EVENTS, DONE)),
    "query": (ANSWER, (*EVENTS, DONE)),
    "detect": ({"objects": []}, ()),
    "segment": (None, OUTLINE),
    "completions": ({"choices": [{"message": MESSAGE, "finish_reason": "stop"}]}, TURN),
    "models": ({"data": [{"id": "moondream3-preview"}]}, ()),
    "stats": ({"status": "ok"}, ()),
    "rollouts": ({"rollouts": [{"output": {"answer": "so"}}]}, ()),
}
REFUSAL = {"error": "Streaming is not supported when reasoning is enabled"}


async def send_slowly(peer, *pieces):
    for piece in pieces:
        await rounds(3)
        await peer.send(piece)


async def answer_slowly(peer):
    while True:
        request = await peer.request()
        plain, events = ANSWERS.get(request.target.rpartition("/")[2], (None, ()))
        said = request.json if request.body else {}
        if said.get("stream") and said.get("reasoning"):
            await send_slowly(peer, whole(REFUSAL, status="400 Bad Request"))
        elif said.get("stream"):
            chunks = [in_chunks(each, end=False) for each in events]
            await send_slowly(peer, STREAM_HEAD, *chunks, in_chunks())
        elif plain is None:
            await send_slowly(peer, whole({"detail": "Not Found"}, status="404 Not Found"))
        else:
            answer = whole(plain)
            await send_slowly(peer, answer[:20], answer[20:-5], answer[-5:])


def fail_before(play):
    """Refuse the request of one connection, lose that of the next, and play on the third."""
    turns = itertools.cycle(["refuse", "lose", "play"])

    async def begin(peer):
        turn = next(turns)
        if turn == "play":
            await play(peer)
        request = await peer.request()
        if turn == "lose" and request.body and request.json.get("stream"):
            await send_slowly(peer, STREAM_HEAD)
        else:
            await send_slowly(peer, head("Content-Length: 0", "Retry-After: 0", status="503 Busy"))

    return begin


# -- calls -----------------------------------------------------------------------------------------


def read(ask):
    async def call(client):
        async with ask(client) as stream:
            assert await stream.text() == TEXT

    return call


def read_events(ask):
    async def call(client):
        stream = await ask(client)
        try:
            async for _ in stream.events:
                pass
            assert stream.text_so_far == TEXT
        finally:
            await stream.aclose()

    return call


async def read_a_word(client):
    async with caption(client) as stream:
        assert await anext(stream) == WORDS[0]


async def wait_for_a_slot(client):
    """The only one is taken, for a while, by another call."""
    other = asyncio.ensure_future(client.caption(IMAGE))
    await asyncio.sleep(0)
    try:
        await read(caption)(client)
    finally:
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)


async def run_in_bulk(client):
    async with client.bulk([IMAGE, IMAGE], "caption", max_retries=5) as run:
        assert [each.result.caption async for each in run] == [TEXT] * 2


async def watch(client):
    async with client.watch([IMAGE], "detect", object="cat") as results:
        async for each in results:
            if not each.ok:
                raise each.error
            assert each.result.objects == []


async def roll_out(client):
    request = md.TuningRequest.query(None, "Why?")
    assert (await client.tuning.rollouts("01HX", request)).rollouts


async def roll_out_many(client):
    requests = [md.TuningRequest.query(None, "Why?")] * 2
    assert len([each async for each in client.tuning.rollout_stream("01HX", requests)]) == 2


KINDS = {
    "caption": lambda client: client.caption(IMAGE),
    "query-without-a-picture": lambda client: client.query(question="What?"),
    "chat": lambda client: client.chat([{"role": "user", "content": "What?"}]),
    "models": lambda client: client.models(),
    "health": lambda client: client.health(),
    "server_stats": lambda client: client.server_stats(),
    "encode_image": lambda client: client.encode_image(SAMPLE_IMAGE),
    "caption-of-a-file": lambda client: client.caption(SAMPLE_IMAGE),
    "caption-of-a-megabyte": lambda client: client.caption(BIG_IMAGE),
    "caption-stream": read(caption),
    "reasoning-stream": read(
        lambda client: client.query(IMAGE, "What?", stream=True, reasoning=True)
    ),
    "segment-stream": read_events(segment),
    "chat-stream": read_events(chat),
    "first-word-of-a-stream": read_a_word,
    "wait-for-a-slot": wait_for_a_slot,
    "rollouts": roll_out,
    "rollout_stream": roll_out_many,
    "bulk": run_in_bulk,
    "watch": watch,
}
ASKED_ONCE = ("health", "encode_image", "watch")


# -- at every await --------------------------------------------------------------------------------


@types.coroutine
def stepping(coroutine, at, interrupt):
    """Run a coroutine; where it waits for the `at`-th time, call `interrupt` with the future.

    Returns what the coroutine returns. It is run by the event loop as always: the
    futures that it waits for are handed on, and the loop's answers handed back.
    """
    resume, argument, count = coroutine.send, None, 0
    while True:
        try:
            waited_for = resume(argument)
        except StopIteration as end:
            return end.value
        if count == at:
            interrupt(waited_for)
        count += 1
        try:
            argument = yield waited_for
        except BaseException as error:  # noqa: BLE001 - it goes where it belongs
            resume, argument = coroutine.throw, error
        else:
            resume = coroutine.send


class Strike:
    """What befalls a call, once, where it waits."""

    error = type(None)

    def __init__(self, client):
        self.client = client
        self.scope = anyio.CancelScope()
        self.task = None
        self.fell = False
        self.closing = None

    def __call__(self, waited_for):
        self.fell = True
        self.task = asyncio.current_task()
        self.strike(waited_for)

    async def ended(self):
        """Return when what it has begun is over."""


class CancelTheTask(Strike):
    def strike(self, _waited_for):
        self.task.cancel()


class CancelAsItGoesOn(Strike):
    """In the moment between the future's result and the task's next step."""

    def strike(self, waited_for):
        if waited_for is None:
            self.task.cancel()
        else:
            waited_for.add_done_callback(lambda _: self.task.cancel())


class CancelTheScope(Strike):
    def strike(self, _waited_for):
        self.scope.cancel()


class CloseTheClient(Strike):
    error = md.ClientClosedError | None  # what was in its last step may still come through
    grace = None

    def strike(self, _waited_for):
        self.closing = asyncio.ensure_future(self.client.aclose(self.grace))

    async def ended(self):
        if self.closing is not None:
            await self.closing


class CloseWithGrace(CloseTheClient):
    grace = 0.01


class CloseInAThread(CloseTheClient):
    def strike(self, _waited_for):
        self.closing = threading.Thread(target=asyncio.run, args=[self.client.aclose()])
        self.closing.start()

    async def ended(self):
        while self.closing is not None and self.closing.is_alive():
            await asyncio.sleep(0)


CANCELLING = [CancelTheTask, CancelAsItGoesOn, CancelTheScope]
CLOSING = [CloseTheClient, CloseWithGrace, CloseInAThread]
MAIN = ("caption", "caption-stream")


def cells():
    """The two main kinds with all strikes; each other with one of either sort, by turns."""
    turns = itertools.cycle(zip(CANCELLING, CLOSING, strict=True))
    for kind in KINDS:
        for strike in CANCELLING + CLOSING if kind in MAIN else next(turns):
            is_fast = kind in MAIN and strike in (CancelTheScope, CloseTheClient)
            marks = () if is_fast else pytest.mark.slow
            yield pytest.param(kind, strike, id=f"{strike.__name__}-{kind}", marks=marks)


@pytest.mark.parametrize(("kind", "strike"), [*cells()])
async def test_call_left_at_any_await_leaves_everything_whole(kind, strike):
    requests, ends = Counter(), Counter()
    hooks = md.Hooks(
        request=lambda event: requests.update([event.call_id]),
        end=lambda event: ends.update([event.call_id]),
    )
    options = {"max_retries": 3, "rate_limit": 1e6, "max_connections": 1, "hooks": hooks}

    async def struck(at):
        with fate.scope:
            await stepping(KINDS[kind](fate.client), at, fate)

    play = answer_slowly if kind in ASKED_ONCE else fail_before(answer_slowly)
    async with RawServer(play) as server:
        client = client_of(server, **options)
        for at in range(1000):
            fate = strike(client)
            task = asyncio.ensure_future(struck(at))
            await asyncio.wait([task])
            await fate.ended()
            while tasks := tasks_besides(server):
                await asyncio.wait(tasks)
            await rounds(5)
            stats = client.stats()
            assert (stats.open_streams, stats.waiting_calls) == (0, 0)
            assert set(requests) <= set(ends)
            assert set(ends.values()) <= {1}
            error = None if task.cancelled() else task.exception()
            assert isinstance(error, strike.error)
            if strike in CLOSING:
                await client.aclose()
                client = client_of(server, **options)
            elif strike is not CancelTheScope:
                assert task.cancelled() is fate.fell
            if not fate.fell:
                break
        assert at > 0
        assert (await client.caption(IMAGE)).caption == TEXT
        await client.aclose()
        await server.until_idle()
