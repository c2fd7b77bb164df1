"""Twenty thousand streams that end in every way, and what they leave in the process."""

import asyncio
import collections
import contextlib
import gc
import random
import subprocess
import sys
import warnings
from pathlib import Path

import anyio
import pytest

import moondream_async as md

STREAMS = 20_000
AT_ONCE = 100
WARM = 2_000  # streams before the first look: by then all caches are filled
SEED = 20

IMAGE = md.EncodedImage(b"\xff\xd8", "image/jpeg", 8, 8)
PROC = Path("/proc/self")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PROC.exists(), reason="needs /proc to count memory and descriptors"),
]


def footprint():
    """Resident memory in bytes, open descriptors, and tasks."""
    gc.collect()
    pages = int((PROC / "statm").read_text().split()[1])
    return pages * 4096, len(list((PROC / "fd").iterdir())), len(asyncio.all_tasks())


async def one(client, chance):
    """Open a stream and end it somehow; return how it ended."""
    way = chance.choice(["read", "read", "leave", "drop", "cancel"])
    try:
        if way == "cancel":
            with anyio.move_on_after(chance.random() * 0.01):
                async with client.caption(IMAGE, stream=True) as stream:
                    await stream.text()
                way = "read"
            return way.replace("cancel", "cancelled")
        stream = await client.caption(IMAGE, stream=True)
        if way == "read":
            await stream.text()
            return "read"
        with contextlib.suppress(StopAsyncIteration):
            await anext(stream)
        if way == "leave":
            await stream.aclose()
    except md.MoondreamError as error:
        return type(error).__name__
    return way  # and a stream that is dropped goes with this frame


@pytest.mark.xfail(reason="grew by 23 MB beside other tests; cause unknown", strict=False)
async def test_twenty_thousand_streams_leave_nothing_behind(capsys):
    server = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        [sys.executable, Path(__file__).with_name("soak_server.py"), str(SEED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with server:
        port = int(server.stdout.readline())
        chance = random.Random(SEED)
        ends = collections.Counter()
        left = iter(range(STREAMS))
        looks = []
        client = md.MoondreamClient(
            endpoint=f"http://127.0.0.1:{port}/v1",
            timeout=md.Timeout(first_event=0.1, idle=0.1),
            max_retries=1,
        )

        async def work(until):
            for number in left:
                ends[await one(client, chance)] += 1
                if number >= until:
                    return

        # A dropped stream says so; here, that is the plan.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            async with client:
                for until in (WARM, STREAMS):
                    async with anyio.create_task_group() as group:
                        for _ in range(AT_ONCE):
                            group.start_soon(work, until)
                    while client.stats().open_streams:
                        await asyncio.sleep(0)
                    looks.append(footprint())
                stats = client.stats()
        server.stdin.close()
        closed = footprint()

    (memory, descriptors, tasks), (memory_after, descriptors_after, tasks_after) = looks
    with capsys.disabled():
        print(  # noqa: T201 - the figures are what it is for
            f"\nsoak: {sum(ends.values())} streams, {dict(ends)}; "
            f"memory {memory / 1e6:.1f} MB after {WARM}, {memory_after / 1e6:.1f} MB at the end; "
            f"descriptors {descriptors}, {descriptors_after}, {closed[1]} when closed; "
            f"tasks {tasks}, {tasks_after}; {stats}"
        )
    assert tasks == tasks_after == closed[2]
    assert descriptors_after <= descriptors + AT_ONCE  # what is kept open is a pool
    assert memory_after - memory < 5_000_000
    assert {"read", "cancelled", "drop", "leave", "StreamInterruptedError"} <= set(ends)
