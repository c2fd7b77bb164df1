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
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import contenders, wire
from .server import allow_many_files
from .wire import Plan

if TYPE_CHECKING:
    from typing import Self


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


async def many(
    module: ModuleType, origin: str, *, skill: str, plan: str, warm: str
) -> dict[str, float]:
    """Open all streams of a plan, then read all their text, then let them end.

    The server waits twice, so that opening, reading and closing are told apart.
    """
    what = Plan.parse(plan)
    total = what.streams * what.events
    if getattr(module, "COUNTS_BYTES", False):
        heads = len(wire.STREAM_HEAD)
        each = (size(what, skill) - heads - len(wire.packets(what, skill)[-1])) / what.events

        def seen() -> float:
            return sum(pieces[0] - heads for pieces in lists if pieces) / each

        def has_begun(pieces: list[Any]) -> bool:
            return bool(pieces) and pieces[0] > heads
    else:

        def seen() -> float:
            return sum(map(len, lists))

        has_begun = bool

    async with module.open(f"{origin}/{plan}/v1", what.streams) as session:
        read = getattr(session, skill)
        async with module.open(f"{origin}/{warm}/v1", 10) as small:
            await getattr(small, skill)([])
        gc.collect()
        lists: list[list[Any]] = [[] for _ in range(what.streams)]
        resident, opening = resident_bytes(), time.process_time()
        reading = asyncio.gather(*map(read, lists))
        await until(lambda: all(map(has_begun, lists)) or reading.done())
        opening = time.process_time() - opening
        resident = resident_bytes() - resident
        await release(origin)
        cpu, wall, before = time.process_time(), time.perf_counter(), seen()
        await until(lambda: seen() >= total or reading.done())
        closing = time.process_time()
        cpu, wall = closing - cpu, time.perf_counter() - wall
        events = seen() - before
        await release(origin)
        await reading
        closing = time.process_time() - closing
    for pieces in lists:
        check(module, what, skill, pieces)
    return {
        "cpu_per_event": cpu / events,
        "cpu_per_stream": opening / what.streams,
        "bytes_per_stream": resident / what.streams,
        "cpu_per_end": closing / what.streams,
        "behind": wall / (events * what.every_us / 1e6 / what.streams),
        "delivered": len(lists),
    }


async def until(happened: Callable[[], bool]) -> None:
    """Look, now and then: contenders are not to be slowed down by telling of each event."""
    while not happened():  # noqa: ASYNC110
        await asyncio.sleep(0.02)


async def release(origin: str) -> None:
    """Tell the server to end the streams that it holds."""
    address = urlsplit(origin)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(b"GET /kind=release/v1/release HTTP/1.1\r\n\r\n")
    await reader.read(1)
    writer.close()
    await writer.wait_closed()


def resident_bytes() -> int:
    """Return how much memory this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Timed(list):  # type: ignore[type-arg]
    """The pieces of a stream, and when the first came."""

    at: float | None = None

    def append(self, piece: Any) -> None:
        """Take a piece."""
        if self.at is None:
            self.at = time.perf_counter()
        super().append(piece)

    def __iadd__(self, pieces: list[Any]) -> Self:  # type: ignore[override,misc]
        if pieces and self.at is None:
            self.at = time.perf_counter()
        self.extend(pieces)
        return self


async def first(
    module: ModuleType, origin: str, *, skill: str, plan: str, at_once: int, times: int
) -> list[float]:
    """Return the seconds from each call to its first piece, once the connections are there."""
    delays: list[float] = []
    async with module.open(f"{origin}/{plan}/v1", at_once) as session:
        read = getattr(session, skill)

        async def one() -> float:
            pieces = Timed()
            begun = time.perf_counter()
            await read(pieces)
            check(module, Plan.parse(plan), skill, pieces)
            assert pieces.at is not None
            return pieces.at - begun

        for number in range(times + 1):
            found = await asyncio.gather(*(one() for _ in range(at_once)))
            if number:
                delays += found
            else:
                gc.collect()
    return delays


async def calls(module: ModuleType, origin: str, *, at_once: int, count: int) -> dict[str, float]:
    """Make plain calls, so many at once."""
    async with module.open(f"{origin}/kind=call/v1", at_once) as session:

        async def some(number: int) -> None:
            for _ in range(number):
                assert (await session.call()).startswith("A grey heron")

        await asyncio.gather(*(some(1) for _ in range(at_once)))
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(some(count // at_once) for _ in range(at_once)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    made = count // at_once * at_once
    return {"cpu": cpu / made, "per_second": made / wall}


def calls_blocking(
    module: ModuleType, origin: str, *, at_once: int, count: int
) -> dict[str, float]:
    """Do the same as `calls` with threads."""
    session = module.open(f"{origin}/kind=call/v1", at_once)

    def some(number: int) -> None:
        for _ in range(number):
            assert session.call().startswith("A grey heron")

    some(1)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        list(pool.map(some, [count // at_once] * at_once))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    made = count // at_once * at_once
    return {"cpu": cpu / made, "per_second": made / wall}


async def bulk(
    module: ModuleType, origin: str, *, paths: list[str], at_once: int, way: str = "bulk"
) -> dict[str, float]:
    """Caption files, so many at once."""
    async with module.open(f"{origin}/kind=call/v1", at_once) as session:
        await getattr(session, way)(paths[:at_once], at_once)
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        answers = await getattr(session, way)(paths, at_once)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert len(answers) == len(paths)
    return {"cpu": cpu / len(paths), "per_second": len(paths) / wall}


def bulk_blocking(
    module: ModuleType, origin: str, *, paths: list[str], at_once: int, way: str = "bulk"
) -> dict[str, float]:
    """Do the same as `bulk` with threads."""
    session = module.open(f"{origin}/kind=call/v1", at_once)
    getattr(session, way)(paths[:at_once], at_once)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = getattr(session, way)(paths, at_once)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    assert len(answers) == len(paths)
    return {"cpu": cpu / len(paths), "per_second": len(paths) / wall}


async def decode(
    module: ModuleType,  # noqa: ARG001 - as the others
    origin: str,  # noqa: ARG001 - as the others
    *,
    size: int,
    packet: int,
) -> dict[str, float]:
    """Feed one large event to the decoder of this project, without a socket."""
    from moondream_async._protocol.events import AnswerDecoder

    data = b"".join(wire.caption_events([wire.large_text(size)]))
    packets = [data[i : i + packet] for i in range(0, len(data), packet)]
    gc.collect()
    cpu = time.process_time()
    decoder = AnswerDecoder("caption")
    text = "".join(event.chunk for each in packets for event in decoder.feed(each))
    cpu = time.process_time() - cpu
    assert text == wire.large_text(size)
    return {"cpu": cpu}


def run(module: ModuleType, task: str, arguments: dict[str, Any]) -> Any:
    """Do one task; return what was measured."""
    if getattr(module, "BLOCKS", False):
        return BLOCKING_TASKS[task](module, **arguments)
    return asyncio.run(TASKS[task](module, **arguments))


TASKS: dict[str, Callable[..., Coroutine[Any, Any, Any]]] = {
    "stream": stream,
    "many": many,
    "first": first,
    "calls": calls,
    "bulk": bulk,
    "decode": decode,
}
BLOCKING_TASKS: dict[str, Callable[..., Any]] = {
    "stream": stream_blocking,
    "calls": calls_blocking,
    "bulk": bulk_blocking,
}


def main() -> None:
    """Take tasks until there are no more."""
    allow_many_files()
    module = contenders.load(sys.argv[1])
    print(json.dumps(module.NAME), flush=True)
    for line in sys.stdin:
        task, arguments = json.loads(line)
        print(json.dumps(run(module, task, arguments)), flush=True)


if __name__ == "__main__":
    main()
