"""How fast is a folder captioned, beside the official SDK in a pool of threads?

The server is the simulator at ``--rate 0``, in a process of its own and the same
for both. `bulk` is the whole command, from its start to its end, with its file of
results; the SDK's contender opens each picture with Pillow and calls `caption`, as
its documentation shows, and keeps nothing. Both have the same concurrency. They take
turns, and the ratio of each turn is told: it is what the machine's load disturbs least.
The processor's time for a picture is told as well, without the server's.

Memory is the command's resident set after a tenth of the pictures and at the end.

Then a server that lets in so many requests a second, and answers 429 to the others:
how near to its limit does the command come, by itself and when it is told of the limit,
and does a picture fail? The server counts, from the first request it lets in to the last.

What this omits: a model takes seconds for a picture, and then none of this matters.
The simulator looks at every picture's pixels, which costs it several times what either
client spends: on a small machine it is the simulator's speed that both show.

    python benchmarks/bench_bulk.py [--pictures 10000] [--turns 3] [--concurrency 16]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

WIDTH, HEIGHT = 320, 240  # pixels
COLOURS = ("red", "green", "blue", "yellow", "black", "purple")


def make_pictures(folder: Path, count: int) -> None:
    """Write small JPEGs, each different: coloured shapes under a grain, some 8 kB each."""
    from PIL import Image, ImageDraw

    random.seed(7)
    folder.mkdir()
    grain = Image.effect_noise((WIDTH, HEIGHT), 20).convert("RGB")
    for number in range(count):
        picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(picture)
        for _ in range(4):
            x, y, side = (
                random.randrange(WIDTH),
                random.randrange(HEIGHT),
                random.randrange(40, 100),
            )
            shape = random.choice((draw.ellipse, draw.rectangle))
            shape((x, y, x + side, y + side), fill=random.choice(COLOURS))
        Image.blend(picture, grain, 0.1).save(folder / f"{number:06}.jpg", "JPEG", quality=85)


def serve(allowed: float) -> None:
    """Run the simulator until stdin ends; with `allowed`, let in so many requests a second."""
    from aiohttp import web

    from moondream_async.simulator import Simulator

    tokens, refilled, refused = allowed, time.monotonic(), 0
    let_in: list[float] = []

    @web.middleware
    async def limited(request, handler):
        nonlocal tokens, refilled, refused
        now = time.monotonic()
        tokens, refilled = min(allowed, tokens + (now - refilled) * allowed), now
        if allowed and tokens < 1:
            refused += 1
            await request.read()
            return web.json_response({"error": {"message": "Too many requests"}}, status=429)
        tokens -= 1
        let_in.append(now)
        return await handler(request)

    async def main() -> None:
        simulator = Simulator(keep=0)
        simulator.app.middlewares.insert(0, limited)
        async with simulator:
            print(simulator.endpoint, flush=True)
            await asyncio.to_thread(sys.stdin.read)
        if allowed:
            # What the full bucket let in at once at the start is no rate.
            late = let_in[int(allowed) :]
            print(refused, (len(late) - 1) / (late[-1] - late[0]), flush=True)

    asyncio.run(main())


@contextlib.contextmanager
def served(allowed: float = 0) -> Iterator[tuple[dict[str, str], subprocess.Popen[str]]]:
    """Run a server in a process of its own; yield the environment that names it."""
    command = [sys.executable, __file__, "--serve", str(allowed)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        endpoint = server.stdout.readline().strip()
        yield {**os.environ, "MOONDREAM_ENDPOINT": endpoint}, server
        server.stdin.close()


def resident(pid: int) -> int:
    """Return a process's resident memory in kB; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
    return 0


def children_seconds() -> float:
    """Return the processor's time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_bulk(folder: Path, environment, *options: str) -> dict[str, float]:
    """Run the command; return seconds, and memory in kB after a tenth and at the end."""
    used = children_seconds()
    total = sum(1 for _ in folder.iterdir())
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "out.jsonl")
        command = [sys.executable, "-m", "moondream_async", "bulk", str(folder), "-o", str(output)]
        began = time.monotonic()
        sizes: list[tuple[int, int]] = []
        with subprocess.Popen(
            [*command, *options], env=environment, stderr=subprocess.PIPE
        ) as process:
            while process.poll() is None:
                time.sleep(0.1)
                written = output.stat().st_size if output.exists() else 0
                sizes.append((written, resident(process.pid)))
            said = process.stderr.read().decode()
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(said)
        records = [json.loads(line) for line in output.read_bytes().splitlines()]
        assert len(records) == total
        most = output.stat().st_size
    early = [memory for written, memory in sizes if memory and written >= most / 10]
    return {
        "seconds": seconds,
        "cpu": children_seconds() - used,
        "early": early[0],
        "late": max(early[-10:]),
    }


def run_sdk(folder: Path, environment, concurrency: int) -> tuple[float, float]:
    """Run the SDK in a fresh process; return seconds, its start included, and the processor's."""
    used = children_seconds()
    command = [sys.executable, __file__, "--sdk", str(folder), str(concurrency)]
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    return time.monotonic() - began, children_seconds() - used


def sdk(folder: Path, concurrency: int) -> None:
    """Caption a folder with the official SDK in a pool of threads."""
    from concurrent.futures import ThreadPoolExecutor

    import moondream
    from PIL import Image

    model = moondream.vl(api_key="none", endpoint=os.environ["MOONDREAM_ENDPOINT"])

    def caption(path: Path) -> str:
        with Image.open(path) as picture:
            return model.caption(picture)["caption"]

    with ThreadPoolExecutor(concurrency) as pool:
        assert all(pool.map(caption, sorted(folder.iterdir())))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--allowed", type=float, default=10, help="requests a second; 0: leave out")
    parser.add_argument("--limited", type=int, default=600, help="pictures for the limited server")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--sdk", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    if arguments.sdk:
        sdk(Path(arguments.sdk[0]), int(arguments.sdk[1]))
        return
    names = ("moondream-async", "moondream", "aiohttp", "pillow")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores,", end=" ")
    print(", ".join(f"{name} {version(name)}" for name in names))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photos")
        make_pictures(folder, arguments.pictures)
        ratios = []
        with served() as (environment, _):
            for _ in range(arguments.turns):
                ours = run_bulk(folder, environment, "--concurrency", str(arguments.concurrency))
                theirs, cpu = run_sdk(folder, environment, arguments.concurrency)
                ratios.append(theirs / ours["seconds"])
                print(
                    f"bulk {arguments.pictures / ours['seconds']:4.0f}/s, "
                    f"{ours['cpu'] / arguments.pictures * 1e3:.2f} ms of CPU each   "
                    f"SDK {arguments.pictures / theirs:4.0f}/s, "
                    f"{cpu / arguments.pictures * 1e3:.2f} ms   ratio {ratios[-1]:.2f}   "
                    f"memory {ours['early'] / 1000:.1f} MB after a tenth, "
                    f"{ours['late'] / 1000:.1f} MB at the end",
                    flush=True,
                )
        print(f"ratio: median {statistics.median(ratios):.2f}, least {min(ratios):.2f}")
        if arguments.allowed:
            few = Path(place, "few")
            make_pictures(few, arguments.limited)
            for told in ([], ["--rate-limit", f"{arguments.allowed:g}"]):
                with served(arguments.allowed) as (environment, server):
                    seconds = run_bulk(few, environment, *told)["seconds"]
                    server.stdin.close()
                    refused, reached = map(float, server.stdout.readline().split())
                print(
                    f"limit {arguments.allowed:g}/s, {'told' if told else 'found'}: "
                    f"{reached:.2f}/s, {reached / arguments.allowed:.1%} of it, "
                    f"{refused:.0f} refused, none failed; {seconds:.1f} s in all",
                    flush=True,
                )


if __name__ == "__main__":
    main()
