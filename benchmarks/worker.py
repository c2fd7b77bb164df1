"""Runs one contender, in a process of its own, as often as it is told; started by `bench`.

Each line of standard input is a task, ``[name, arguments]``; each line of standard output
what was measured. Times of the processor are those of this whole process, the kernel's
work for it included. Every task opens its own client and event loop, and makes it read a
little first, so that imports, connections and caches are not measured.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import sys
import time
from types import ModuleType
from typing import Any

from . import contenders, wire
from .server import allow_many_files
from .wire import Plan


def check(module: ModuleType, plan: Plan, skill: str, pieces: list[Any]) -> None:
    """Raise if not every piece of a stream has arrived."""
    if getattr(module, "COUNTS_BYTES", False):
        complete = pieces[0] == size(plan, skill)
    else:
        complete = "".join(pieces) == wire.expected(plan)
    if not complete:
        raise AssertionError(f"{module.NAME} lost something of {plan}")


def size(plan: Plan, skill: str) -> int:
    return len(wire.STREAM_HEAD) + sum(map(len, wire.packets(plan, skill)))


async def stream(
    module: ModuleType, origin: str, *, skill: str, plan: str, warm: str
) -> dict[str, float]:
    """Read all streams of a plan at once, once they have been read in small."""
    async with module.open(f"{origin}/{plan}/v1", 10) as session:
        read = getattr(session, skill)
        lists: list[list[Any]] = [[] for _ in range(Plan.parse(plan).streams)]
        async with module.open(f"{origin}/{warm}/v1", 10) as small:
            await getattr(small, skill)([])
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(read, lists))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for pieces in lists:
        check(module, Plan.parse(plan), skill, pieces)
    return {"cpu": cpu, "wall": wall}


def stream_blocking(
    module: ModuleType, origin: str, *, skill: str, plan: str, warm: str
) -> dict[str, float]:
    """Do the same as `stream` with threads."""
    getattr(module.open(f"{origin}/{warm}/v1", 10), skill)([])
    read = getattr(module.open(f"{origin}/{plan}/v1", 10), skill)
    lists: list[list[Any]] = [[] for _ in range(Plan.parse(plan).streams)]
    gc.collect()
    with concurrent.futures.ThreadPoolExecutor(len(lists)) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        list(pool.map(read, lists))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for pieces in lists:
        check(module, Plan.parse(plan), skill, pieces)
    return {"cpu": cpu, "wall": wall}


def run(module: ModuleType, task: str, arguments: dict[str, Any]) -> Any:
    """Do one task; return what was measured."""
    if getattr(module, "BLOCKS", False):
        return BLOCKING_TASKS[task](module, **arguments)
    return asyncio.run(TASKS[task](module, **arguments))


TASKS = {"stream": stream}
BLOCKING_TASKS = {"stream": stream_blocking}


def main() -> None:
    """Take tasks until there are no more."""
    allow_many_files()
    module = contenders.load(sys.argv[1])
    print(json.dumps({"name": module.NAME, "versions": contenders.versions(module)}), flush=True)
    for line in sys.stdin:
        task, arguments = json.loads(line)
        print(json.dumps(run(module, task, arguments)), flush=True)


if __name__ == "__main__":
    main()
