"""Events that arrive 32 to a packet: what does the processor do for each of them?

Twice: packets back to back, as fast as they are read, so that the kernel hands over many
at once; and each packet alone, in 8 streams, so that the loop is woken for every 32 events.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import ALL, FLOOR, OURS, RAW, load
from benchmarks.results import Outcome, Table, Target
from benchmarks.wire import Plan

NAME = "coalesced"
TITLE = "Events, 32 to a packet"
PER = 32
SHARE = {
    RAW: 4,
    FLOOR: 4,
    OURS: 4,
    "httpx_sse": 0.5,
    "httpx2_sse": 0.5,
    "openai_default": 0.125,
    "openai_aiohttp": 0.125,
}
"""How many times the events these are given, so that all take a time alike."""


PER_PACKET = (
    "Whatever is in a packet, it passes the stream, its clock, the body and the decoder, in calls "
    "of functions that tests/test_work.py counts, beside those that it costs aiohttp."
)


def run(bench: Bench) -> Outcome:
    events = PER * (200 if bench.quick else 800)
    chats = tuple(name for name in ALL if name != "huggingface")
    captions = tuple(name for name in chats if not name.startswith("openai"))
    tables = [
        measure(bench, "back to back, captions", "caption", captions, events=events),
        measure(bench, "back to back, engine", "caption", captions, events=events, kind="engine"),
        measure(bench, "back to back, chat", "chat", chats, events=events),
        measure(
            bench,
            "one packet at a time, captions",
            "caption",
            captions,
            events=events,
            every_us=2000,
        ),
    ]
    return Outcome(NAME, TITLE, tables, [*targets(*tables)])


def measure(
    bench: Bench,
    title: str,
    skill: str,
    names: tuple[str, ...],
    *,
    events: int,
    every_us: int = 0,
    kind: str = "stream",
) -> Table:
    bench.say(f"{NAME}: {title}")
    streams = 8 if every_us else 1
    tasks, counts = {}, {}
    for name in names:
        share = int(events * SHARE.get(name, 1)) // streams // PER * PER
        plan = Plan(kind, events=share, per=PER, streams=streams, every_us=every_us)
        arguments = {"skill": skill, "plan": str(plan), "warm": str(Plan(events=PER * 4, per=PER))}
        tasks[name] = (name, "stream", arguments)
        counts[name] = share * streams
    rounds = 3 if bench.quick else 5
    found = bench.rounds(rounds, tasks)
    labels = {name: bench.names[name] for name in found}
    return Table(
        title,
        "microseconds of CPU an event",
        {
            labels[name]: [each["cpu"] / counts[name] * 1e6 for each in values]
            for name, values in found.items()
        },
        floor=labels[FLOOR],
        us=labels[OURS],
    )


def woken(table: Table, name: str) -> str:
    """Tell how much less the floor costs."""
    times = table.ratio(name, table.floor) or 0
    return (
        f"The aiohttp floor itself is {times:.1f} times cheaper: to be woken for each packet, and "
        "to read it, is most of the cost."
    )


def targets(burst: Table, engine: Table, chat: Table, single: Table) -> list[Target]:
    ours = load(OURS).NAME
    found = []
    for table, most in ((burst, 1.35), (engine, 1.35), (single, 1.25)):
        found += [
            Target(
                f"{table.title}: CPU an event, of the aiohttp floor",
                table.ratio(ours, table.floor),
                most,
                obstacle=PER_PACKET,
            ),
            *(
                Target(
                    f"{table.title}: {name}, times ours",
                    table.ratio(name, ours),
                    6,
                    at_least=True,
                    obstacle=woken(table, name),
                )
                for name in ("aiohttp, async for line", "official SDK")
            ),
        ]
    found.append(
        Target(
            f"{chat.title}: CPU an event, of the aiohttp floor", chat.ratio(ours, chat.floor), 1.35
        )
    )
    found += [
        Target(f"{chat.title}: {name}, times ours", chat.ratio(name, ours), 50, at_least=True)
        for name in ("openai", "openai, aiohttp")
    ]
    return found
