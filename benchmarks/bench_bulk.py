"""How fast is a folder captioned, beside the official SDK in a pool of threads?

The server is the simulator at ``--rate 0``, in a process of its own and the same
for both. `bulk` is the whole command, from its start to its end, with its file of
results; the SDK's contender opens each picture with Pillow and calls `caption`, as
its documentation shows, and keeps nothing. Both have the same concurrency. They take
turns, and the ratio of each turn is told: it is what the machine's load disturbs least.

Memory is the command's resident set after a tenth of the pictures and at the end.

Then a server that lets in so many requests a second, and answers 429 to the others:
how near to its limit does the command come by itself, and does a picture fail?

What this omits: a model takes seconds for a picture, and then none of this matters.
With both cores of a small machine busy with the simulator, its time is in all figures.

    python benchmarks/bench_bulk.py [--pictures 10000] [--turns 3] [--concurrency 16]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

SIDE = 64  # pixels


def make_pictures(folder: Path, count: int) -> None:
    """Write small JPEGs, each different."""
    from PIL import Image

    random.seed(7)
    folder.mkdir()
    for number in range(count):
        picture = Image.frombytes("RGB", (8, 8), random.randbytes(192)).resize((SIDE, SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
        (folder / f"{number:06}.jpg").write_bytes(file.getvalue())


def serve(allowed: float) -> None:
    """Run the simulator until stdin ends; with `allowed`, let in so many requests a second."""
    from aiohttp import web

    from moondream_async.simulator import Simulator

    tokens, refilled, refused = allowed, time.monotonic(), 0

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
        return await handler(request)

    async def main() -> None:
        simulator = Simulator(keep=0)
        simulator.app.middlewares.insert(0, limited)
        async with simulator:
            print(simulator.endpoint, flush=True)
            await asyncio.to_thread(sys.stdin.read)
        if allowed:
            print(refused, flush=True)

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


def run_bulk(folder: Path, environment, *options: str) -> dict[str, float]:
    """Run the command; return seconds, and memory in kB after a tenth and at the end."""
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
    return {"seconds": seconds, "early": early[0], "late": max(early[-10:])}


def run_sdk(folder: Path, environment, concurrency: int) -> float:
    """Run the SDK in a fresh process; return seconds, its start included."""
    command = [sys.executable, __file__, "--sdk", str(folder), str(concurrency)]
    began = time.monotonic()
    subprocess.run(command, env=environment, check=True)
    return time.monotonic() - began


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
                theirs = run_sdk(folder, environment, arguments.concurrency)
                ratios.append(theirs / ours["seconds"])
                print(
                    f"bulk {arguments.pictures / ours['seconds']:6.0f}/s   "
                    f"SDK {arguments.pictures / theirs:6.0f}/s   ratio {ratios[-1]:.2f}   "
                    f"memory {ours['early'] / 1000:.1f} MB after a tenth, "
                    f"{ours['late'] / 1000:.1f} MB at the end",
                    flush=True,
                )
        print(f"ratio: median {statistics.median(ratios):.2f}, least {min(ratios):.2f}")
        if arguments.allowed:
            few = Path(place, "few")
            make_pictures(few, arguments.limited)
            with served(arguments.allowed) as (environment, server):
                seconds = run_bulk(few, environment)["seconds"]
                server.stdin.close()
                refused = int(server.stdout.readline())
            reached = arguments.limited / seconds
            print(
                f"limit {arguments.allowed:g}/s: {reached:.2f}/s, "
                f"{reached / arguments.allowed:.1%} of it, {refused} refused, none failed"
            )


if __name__ == "__main__":
    main()
