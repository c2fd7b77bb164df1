"""Do the limits of `Timeout` fire when they say, and does the rate limit keep its pace?

::

    python benchmarks/bench_deadlines.py

Each limit of 0.1, 0.5 and 2 seconds is left to run out 5 times, one after the other,
at a server of bare sockets in a thread of its own: there is no free place, TLS is never
answered, no event comes, nothing but comments and half events comes after the first
one, or events go on for ever. Shown are the least and the most that it took, and the
worst ratio to the limit. A reader that takes its time over each of three events is to
see none of them.

Then 60 calls ask at once, at rates of 10 and 50 a second; the server notes on the
monotonic clock when each request has arrived. Shown is the most by which any two of
them, neighbours or not, were nearer to each other than the rate says: what a request
takes from the client to the server, more at one time than at another.

What this leaves out: a loaded event loop, and the network.
"""

import asyncio
import contextlib
import platform
import threading
import time
from importlib.metadata import version

import moondream_async as md

LIMITS = (0.1, 0.5, 2.0)
RUNS = 5
PACED_CALLS = 60
RATES = (10, 50)

IMAGE = md.EncodedImage(b"no picture that anybody looks at", "image/jpeg", 8, 8)
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n"
ANSWER += b'{"caption": "ok"}'
CHUNK = b'data: {"chunk": "a "}\n\n'


class Server:
    """Plays one part after the other, in a thread of its own."""

    def __init__(self):
        self.part = None
        self.arrivals = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc_info):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._play, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _play(self, reader, writer):
        try:
            if self.part != hang:
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length:")[2].split()[0]
                    await reader.readexactly(int(length))
                    self.arrivals.append(time.monotonic())
                    await self.part(writer)
            await reader.read()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


# -- the parts, and what is called meanwhile -------------------------------------------


async def hang(writer):
    """Take the connection, and nothing more."""


async def keep_silent(writer):  # noqa: ARG001 - as the others
    await asyncio.sleep(3600)


async def begin(writer):
    writer.write(EVENTS)
    await writer.drain()
    await asyncio.sleep(3600)


async def chatter(writer):
    """Say something, and then nothing that counts."""
    writer.write(EVENTS + CHUNK)
    while True:
        writer.write(b": still there\nid: 7\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def go_on(writer):
    writer.write(EVENTS)
    while True:
        writer.write(CHUNK)
        await writer.drain()
        await asyncio.sleep(0.01)


async def dawdle(writer):
    writer.write(EVENTS + CHUNK * 3 + b'data: {"completed": true}\n\n')
    await writer.drain()
    writer.close()


async def answer(writer):
    writer.write(ANSWER)
    await writer.drain()


async def call(client):
    await client.caption(IMAGE)


async def stream(client):
    async with client.caption(IMAGE, stream=True) as pieces:
        await pieces.text()


async def read_on(client):
    async with client.caption(IMAGE, stream=True) as pieces:
        await anext(pieces)
        with from_now():
            await pieces.text()


async def call_in_line(client):
    async with client.caption(IMAGE, stream=True) as pieces:
        await anext(pieces)
        with from_now():
            await client.caption(IMAGE)


@contextlib.contextmanager
def from_now():
    """What runs out of time in here began here."""
    begun = time.monotonic()
    try:
        yield
    except md.APITimeoutError as error:
        error.begun = begun
        raise


# name: (the limit, the server's part, what is called)
CASES = {
    "pool": ("pool", go_on, call_in_line),
    "connect": ("connect", hang, call),
    "first_event, plain": ("first_event", keep_silent, call),
    "first_event, streamed": ("first_event", begin, stream),
    "idle": ("idle", chatter, read_on),
    "total, before the answer": ("total", keep_silent, stream),
    "total, reading": ("total", go_on, stream),
}
NONE = dict.fromkeys(("pool", "connect", "first_event", "idle", "total"))


async def time_one(server, phase, limit, act):
    scheme = "https" if server.part is hang else "http"
    async with md.MoondreamClient(
        endpoint=f"{scheme}://{server.address}/v1",
        timeout=md.Timeout(**(NONE | {phase: limit})),
        max_retries=0,
        max_connections=1,
    ) as client:
        begun = time.monotonic()
        try:
            await act(client)
        except md.APITimeoutError as error:
            took = time.monotonic() - getattr(error, "begun", begun)
            if error.phase == phase:
                return took
            raise
    raise AssertionError(f"{phase} did not fire")


async def read_slowly(server, limit):
    async with (
        md.MoondreamClient(
            endpoint=f"http://{server.address}/v1",
            timeout=md.Timeout(**(NONE | {"idle": limit})),
            max_retries=0,
        ) as client,
        client.caption(IMAGE, stream=True) as pieces,
    ):
        async for _ in pieces:
            await asyncio.sleep(2 * limit)
        assert pieces.completed


async def time_pace(server, rate):
    server.arrivals.clear()
    async with md.MoondreamClient(
        endpoint=f"http://{server.address}/v1", rate_limit=rate, max_retries=0
    ) as client:
        await asyncio.gather(*(client.caption(IMAGE) for _ in range(PACED_CALLS)))
    return sorted(server.arrivals)


def main():
    print(f"Python {platform.python_version()}, aiohttp {version('aiohttp')}")
    with Server() as server:
        print(f"\n{'limit':26} {'seconds':>8} {'least':>8} {'most':>8} {'worst ratio':>12}")
        for name, (phase, part, act) in CASES.items():
            server.part = part
            for limit in LIMITS:
                took = [asyncio.run(time_one(server, phase, limit, act)) for _ in range(RUNS)]
                worst = max((each / limit for each in took), key=lambda ratio: abs(ratio - 1))
                print(
                    f"{name:26} {limit:8.1f} {min(took):8.4f} {max(took):8.4f} {worst:12.3f}",
                    flush=True,
                )
        server.part = dawdle
        for limit in LIMITS:
            asyncio.run(read_slowly(server, limit))
        print(f"{'idle, a slow reader':26} never fired")

        print(f"\n{'rate':26} {'seconds':>8} {'nearer by, at most':>30}")
        server.part = answer
        for rate in RATES:
            at = asyncio.run(time_pace(server, rate))
            nearer = max((j - i) / rate - (at[j] - at[i]) for j in range(len(at)) for i in range(j))
            print(f"{rate:<26} {at[-1] - at[0]:8.3f} {nearer:27.4f} s")


if __name__ == "__main__":
    main()
