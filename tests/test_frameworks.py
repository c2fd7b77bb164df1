"""Streams given to web frameworks, each under its real server, between a browser and the API.

The API is a server of bare sockets that plays what the question asks for, and the browser an
HTTP client. ``pytest --disconnect-report`` prints how long it took from the browser's leaving
to the end of the request at the API.
"""

import asyncio
import inspect
import json
import shutil
import textwrap
import time
from typing import NamedTuple

import aiohttp
import backends
import pytest
from backends import BACKENDS, bound, own, running
from raw_server import EVENTS, STREAM, STREAM_HEAD, TEXT, WORDS, RawServer, event, in_chunks
from sources import no_cycles
from test_docs import SNIPPETS

from moondream_async._protocol.sse import SSEParser
from moondream_async._stream.relay import HEARTBEAT

pytestmark = pytest.mark.slow  # frameworks and their servers say the same on every Python

FIRST = STREAM_HEAD + in_chunks(EVENTS[0], end=False)
BLOCK = in_chunks(event("x" * 16_000), end=False)
BOUND = 16_000_000  # what the kernel holds on the way, at the most that Linux sets by itself

on_each = pytest.mark.parametrize(("backend", "server"), BACKENDS.values(), ids=BACKENDS)


class Api:
    """Plays what it is asked for, on every connection.

    Attributes:
        go_on: Lets an answer that waits for it go on.
        gone: When a client left an answer that has no end.
    """

    def __init__(self):
        self.go_on = asyncio.Event()
        self.gone = asyncio.Queue()

    async def __call__(self, peer):
        while True:
            play = getattr(self, (await peer.request()).json["question"])
            await play(peer)

    async def answer(self, peer):
        await peer.send(STREAM)

    async def break_off(self, peer):
        await peer.send(FIRST)
        peer.close()

    async def think(self, peer):
        await peer.send(STREAM_HEAD)
        await self.go_on.wait()
        await peer.send(STREAM[len(STREAM_HEAD) :])

    async def think_for_ever(self, peer):
        await peer.send(STREAM_HEAD)
        await self._until_gone(peer.until_gone())

    async def pause_for_ever(self, peer):
        await peer.send(FIRST)
        await self._until_gone(peer.until_gone())

    async def talk_for_ever(self, peer):
        await peer.send(STREAM_HEAD)
        await self._until_gone(self._talk(peer))

    async def _talk(self, peer):
        while True:
            await peer.send(BLOCK)

    async def _until_gone(self, doing):
        try:
            await doing
        finally:
            self.gone.put_nowait(time.perf_counter())


class Place(NamedTuple):
    """A backend that runs, and what is on both sides of it."""

    api: Api
    upstream: RawServer
    browser: aiohttp.ClientSession
    address: str

    def get(self, path, question):
        return self.browser.get(path, params={"question": question})


@pytest.fixture
async def place(backend, server, photo, tmp_path, monkeypatch):
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    api = Api()
    async with RawServer(api, sock=bound()) as upstream:
        monkeypatch.setenv("MOONDREAM_ENDPOINT", upstream.endpoint)
        async with running(backend, server) as address, aiohttp.ClientSession(address) as browser:
            yield Place(api, upstream, browser, address)
        await upstream.until_idle()  # the client was closed with the backend


def parse(data):
    return [(event.event, json.loads(event.data)) for event in SSEParser().feed(data)]


# -- what arrives ------------------------------------------------------------------------


async def answers_arrive_over_one_client(place):
    """Whose end is for the end of the fixture to see."""
    async with place.get("/text", "answer") as response:
        assert response.content_type == "text/plain"
        assert await response.text() == TEXT

    async with place.get("/ask", "answer") as response:
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Accel-Buffering"] == "no"
        *chunks, (name, done) = parse(await response.read())
    assert chunks == [("chunk", {"chunk": word}) for word in WORDS]
    assert (name, done["request_id"]) == ("done", "r-1")

    async with place.get("/restless", "think") as response:
        silence = await response.content.readexactly(3 * len(HEARTBEAT))
        place.api.go_on.set()
        events = parse(await response.read())
    assert silence == 3 * HEARTBEAT
    assert [name for name, _ in events] == ["chunk", "chunk", "chunk", "done"]
    assert place.upstream.open == len(place.upstream.peers) == 1

    async with place.get("/ask", "break_off") as response:  # after the first byte
        first, (name, data) = parse(await response.read())
    assert first == ("chunk", {"chunk": WORDS[0]})
    assert name == "error"
    assert data["error"]["type"] == "StreamInterruptedError"


# -- who goes away -----------------------------------------------------------------------


async def leveled_off(peer):
    """Wait until the API can send no more; return how much it has sent."""
    sent = -1
    while sent != peer.bytes_sent:
        sent = peer.bytes_sent
        for _ in range(300):
            await asyncio.sleep(0)
    return sent


async def while_it_thinks(place, path):
    return await place.get(path, "think_for_ever")


async def between_two_pieces(place, path):
    response = await place.get(path, "pause_for_ever")
    await response.content.readuntil(WORDS[0].strip().encode())
    return response


async def while_it_talks(place, path):
    response = await place.get(path, "talk_for_ever")
    await response.content.readexactly(100_000)
    return response


async def while_it_waits_for_a_slow_browser(place, path):
    response = await place.get(path, "talk_for_ever")
    peer = place.upstream.peers[-1]

    sent = await leveled_off(peer)

    assert sent < BOUND
    while peer.bytes_sent == sent:  # and reading on lets it go on
        await response.content.readany()
    await leveled_off(peer)
    return response


MOMENTS = [
    while_it_thinks,
    between_two_pieces,
    while_it_talks,
    while_it_waits_for_a_slow_browser,
]


@on_each
async def test_answers_arrive_and_when_a_browser_goes_away_its_request_ends_at_once(
    place, server, request, disconnect_report
):
    """And before that, a slow one slows the API."""
    await answers_arrive_over_one_client(place)

    paths = ["/text", "/ask"][:: 1 if server is backends.uvicorn else -1] * 2  # each at each moment
    with no_cycles():  # no framework's exception may keep the stream until it is collected
        for path, ask in zip(paths, MOMENTS, strict=True):
            response = await ask(place, path)
            began = time.perf_counter()
            response.close()
            seconds = await place.api.gone.get() - began
            name = f"{request.node.callspec.id} {path} {ask.__name__}"
            disconnect_report.append(f"{name.replace('_', ' '):60} {seconds * 1000:6.1f} ms")


@pytest.mark.parametrize(("backend", "server"), [(backends.aiohttp, own)], ids=["aiohttp"])
async def test_aiohttp_that_cancels_nobody_sees_the_browser_go_with_the_next_heartbeat(place):
    response = await place.get("/restless", "think_for_ever")

    response.close()

    await place.api.gone.get()


# -- the README --------------------------------------------------------------------------


def test_the_backends_of_the_readme_are_these():
    written = [code for code in SNIPPETS if "FastAPI" in code or "aiohttp import web" in code]
    run = [
        textwrap.dedent(inspect.getsource(each).partition("\n")[2])
        for each in (backends.fastapi, backends.aiohttp)
    ]

    assert all(any(body.startswith(code) for body in run) for code in written)
