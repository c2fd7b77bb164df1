"""A thousand streams, a small event every 20 ms in each: what does the processor do?

That is 50,000 events a second, more than some contenders can take: those fall behind, get
several events at once, and are better off for it. How far they fall behind is shown.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import FLOOR, OURS, RAW
from benchmarks.results import Outcome, Table, Target
from benchmarks.wire import Plan

NAME = "many"
TITLE = "A thousand streams, an event every 20 ms in each"
STREAMS = 1_000
SLOW = "httpx2_sse"
"""It takes longer to close a thousand streams than the others to read theirs."""
CONTENDERS = (RAW, FLOOR, OURS, "aiohttp_plain", SLOW)


PER_EVENT = (
    "An event is a packet here, and a packet passes the stream, its clock, the body and the "
    "decoder, in calls of functions that tests/test_work.py counts, beside aiohttp's own."
)
MEMORY = (
    "Beside aiohttp's objects for a response there are the stream, its body, its decoder with what "
    "it has learnt of the events, its clock and its place among the open ones."
)


def run(bench: Bench) -> Outcome:
    bench.say(f"{NAME}: {STREAMS} streams")
    plan = Plan(events=31 if bench.quick else 61, streams=STREAMS, every_us=20_000, hold=1)
    arguments = {"skill": "caption", "plan": str(plan), "warm": str(Plan(events=100))}
    tasks = {name: (name, "many", arguments) for name in CONTENDERS}
    if bench.quick:
        del tasks[SLOW]
    found = bench.rounds(2 if bench.quick else 3, tasks, fresh=True, seldom={SLOW})

    def table(title: str, unit: str, key: str, factor: float, digits: int = 2) -> Table:
        samples = {
            bench.names[name]: [each[key] * factor for each in values]
            for name, values in found.items()
        }
        return Table(title, unit, samples, floor=floor, us=ours, digits=digits)

    ours, floor, sse = (bench.names.get(name, name) for name in (OURS, FLOOR, SLOW))
    events = table("reading", "microseconds of CPU an event", "cpu_per_event", 1e6)
    memory = table("memory", "KiB an open stream", "bytes_per_stream", 1 / 1024, 1)
    opening = table("opening", "microseconds of CPU a stream", "cpu_per_stream", 1e6, 0)
    closing = table("closing", "microseconds of CPU a stream", "cpu_per_end", 1e6, 0)
    behind = table("behind", "times as long as the server would take", "behind", 1)
    targets = [
        Target(
            "CPU an event, of the aiohttp floor", events.ratio(ours, floor), 1.2, obstacle=PER_EVENT
        ),
        Target("CPU an event, of httpx2 + httpx-sse", events.ratio(ours, sse), 0.5),
        Target(
            "memory an open stream, of the aiohttp floor",
            memory.ratio(ours, floor),
            1.25,
            obstacle=MEMORY,
        ),
    ]
    return Outcome(NAME, TITLE, [events, memory, opening, closing, behind], targets)
