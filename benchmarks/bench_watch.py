"""How old are the answers about a camera, and does anything grow?

A camera of 30 frames a second, and a server in a process of its own that takes so long, with
jitter of a half either way; it may fail, and be gone for a while. An answer's age is to be one
frame (33 ms) and one call at most. What a machine adds that is busy with other things is told
apart: how late a timer of the same loop was at worst since the answer before, and how many newer
frames there were when the request was sent. Run it as::

    python -m benchmarks.bench_watch --seconds 600 --delay 0.4 [--errors 0.2] [--gone 60]

Without ``--delay``, the scenarios of the table in the README run one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

FPS = 30
SCENARIOS = [(0.1, 0, 0), (0.4, 0, 0), (2.0, 0, 0), (0.4, 0.2, 0), (0.4, 0, 60)]


def serve(port: int, delay: float, errors: float) -> None:
    """Be the server."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(delay * random.uniform(0.5, 1.5))
        if random.random() < errors:
            return web.json_response({"error": "busy"}, status=503)
        return web.json_response({"caption": "A picture.", "finish_reason": "stop"})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/caption", answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


class Server:
    """A server in a process of its own, which can be gone for a while."""

    def __init__(self, port: int, delay: float, errors: float) -> None:
        self._command = [sys.executable, "-m", "benchmarks.bench_watch", "--serve", str(port)]
        self._command += ["--delay", str(delay), "--errors", str(errors)]
        self._port = port
        self._process: subprocess.Popen | None = None

    async def start(self) -> None:
        """Start it; return when it listens."""
        self._process = subprocess.Popen(self._command)  # noqa: ASYNC220 - it takes a moment
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                return
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


def held() -> tuple[float, int, int, int]:
    """Megabytes in memory, tasks, threads, and file descriptors."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    rss = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    fds = len(list(Path("/proc/self/fd").iterdir()))
    return rss, len(asyncio.all_tasks()), threading.active_count(), fds


async def camera(until: float):
    """Give frames at 30 a second, none of which was seen before."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (360, 640, 3), np.uint8)
    due = time.monotonic()
    while time.monotonic() < until:
        noise[:8] = rng.integers(0, 256, (8, 640, 3), np.uint8)
        yield noise.copy()
        due = max(due + 1 / FPS, time.monotonic())
        await asyncio.sleep(due - time.monotonic())


async def measure(*, seconds: float, delay: float, errors: float, gone: float) -> None:
    import moondream_async as md

    with contextlib.closing(__import__("socket").socket()) as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    server = Server(port, delay, errors)
    await server.start()
    calls, ages, beyond, failures, early, outage = [], [], [], 0, None, [0.0, 0.0]
    newest, newer, late, unexplained = 0, [], [0.0], []
    began = time.monotonic()

    async def go_away() -> None:
        await asyncio.sleep(seconds / 3)
        server.stop()
        outage[0] = time.monotonic()
        await asyncio.sleep(gone)
        await server.start()
        outage[1] = time.monotonic()

    def sent(_) -> None:
        nonlocal newest
        newest = watch.frames - 1

    async def tick() -> None:
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            late[0] = max(late[0], time.monotonic() - due)

    hooks = md.Hooks(request=sent, end=lambda event: calls.append(event.seconds))
    ticking = asyncio.create_task(tick())
    away = asyncio.create_task(go_away()) if gone else None
    back = None
    async with (
        md.MoondreamClient(endpoint=f"http://127.0.0.1:{port}/v1", hooks=hooks) as client,
        client.watch(camera(began + seconds)) as watch,
    ):
        async for each in watch:
            if time.monotonic() - began > seconds:
                break  # the last frame of all waits for the call before it, without a successor
            failures += not each.ok
            ages.append(each.age)
            beyond.append(each.age - calls[-1])
            newer.append(newest - each.index if each.ok else 0)
            unexplained.append(beyond[-1] - late[0])
            late[0] = 0.0
            if each.ok and outage[1] and back is None:
                back = time.monotonic() - outage[1]
            if early is None and time.monotonic() - began > seconds / 5:
                early = held()
        at_end = held()
    ticking.cancel()
    if away is not None:
        await away
    server.stop()
    ages.sort()
    print(
        f"| {delay:g} s | {errors:.0%} | {gone:g} s | {seconds:.0f} s | {watch.frames}"
        f" | {len(ages)}"
        f" | {failures} | {statistics.median(ages):.3f} | {ages[len(ages) * 95 // 100]:.3f}"
        f" | {ages[-1]:.3f} | {statistics.median(beyond) * 1000:.1f} | {max(beyond) * 1000:.0f}"
        f" | {max(unexplained) * 1000:.0f} | {max(newer)}"
        f" | {early[0]:.0f} -> {at_end[0]:.0f} | {early[1]} -> {at_end[1]}"
        f" | {early[2]} -> {at_end[2]} | {early[3]} -> {at_end[3]}"
        f" | {'' if back is None else f'{back:.1f} s'} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", type=int)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--delay", type=float)
    parser.add_argument("--errors", type=float, default=0)
    parser.add_argument("--gone", type=float, default=0)
    options = parser.parse_args()
    if not options.serve:
        print(
            "| server | errors | gone | seconds | frames | answers | failed | age: median, s | 95%"
            " | max | beyond the call: median, ms | max | less the loop's lateness: max"
            " | newer frames when sent: max | memory, MB | tasks | threads | descriptors | back |"
        )
    if options.serve:
        serve(options.serve, options.delay, options.errors)
        return
    scenarios = SCENARIOS
    if options.delay is not None:
        scenarios = [(options.delay, options.errors, options.gone)]
    for delay, errors, gone in scenarios:
        asyncio.run(measure(seconds=options.seconds, delay=delay, errors=errors, gone=gone))


if __name__ == "__main__":
    main()
