"""Thousands of streams that end in every way, in a process of their own: what they leave in it."""

import asyncio
import collections
import contextlib
import gc
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import anyio
import pytest
from canned import IMAGE

import moondream_async as md

AT_ONCE = 50
STREAMS = 800  # between two looks; by the first look all caches are filled
SEED = 20


def footprint():
    """The objects that the collector knows, by kind, and all of them; descriptors; and tasks."""
    gc.collect()
    allocated = sys.getallocatedblocks()
    kinds = collections.Counter(type(each).__qualname__ for each in gc.get_objects())
    kinds["all"] = allocated
    descriptors = Path("/proc/self/fd")
    return kinds, len([*descriptors.iterdir()]), len(asyncio.all_tasks())


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


async def soak(port):
    chance = random.Random(SEED)
    ends, looks = collections.Counter(), []
    limits = md.Timeout(first_event=0.1, idle=0.1)
    client = md.MoondreamClient(
        endpoint=f"http://127.0.0.1:{port}/v1", timeout=limits, max_retries=1
    )

    async def work():
        for _ in range(STREAMS // AT_ONCE):
            ends[await one(client, chance)] += 1

    async with client:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                for _ in range(AT_ONCE):
                    group.start_soon(work)
            while client.stats().open_streams:
                await asyncio.sleep(0)
            looks.append(footprint())
    looks.append(footprint())
    return {"ends": ends, "looks": looks}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to count descriptors")
def test_thousands_of_streams_leave_nothing_behind():
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("soak_server.py"), str(SEED)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with server:
        command = [sys.executable, __file__, server.stdout.readline().strip()]
        said = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        server.stdin.close()

    _, before, after, closed = said["looks"]
    (kinds, descriptors, tasks), (kinds_after, descriptors_after, tasks_after) = before, after
    assert tasks == tasks_after == closed[2]
    assert descriptors_after <= descriptors + AT_ONCE  # what is kept open is a pool
    grown = {kind: count - kinds.get(kind, 0) for kind, count in kinds_after.items()}
    # Connections that are kept differ in number: of nothing is there one more for each stream.
    assert {kind: more for kind, more in grown.items() if more > STREAMS // 2} == {}
    assert {"read", "cancelled", "drop", "leave", "StreamInterruptedError"} <= said["ends"].keys()


if __name__ == "__main__":
    warnings.simplefilter("ignore", ResourceWarning)  # a dropped stream says so: that is the plan
    print(json.dumps(asyncio.run(soak(int(sys.argv[1])))))  # noqa: T201 - a program
