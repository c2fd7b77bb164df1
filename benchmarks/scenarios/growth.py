"""What an event and a stream cost when there are more and more streams.

All streams together get 10,000 events a second, however many they are, so that nothing
changes but their number.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import FLOOR, OURS, load
from benchmarks.results import Outcome, Table, Target, quartiles
from benchmarks.wire import Plan

NAME = "growth"
TITLE = "One stream to ten thousand, 10,000 events a second in all of them"
STREAMS = (1, 10, 100, 1_000, 10_000)
MOST = {"httpx2_sse": 1_000}
"""Beyond that, its connection pool takes minutes."""
QUICK = {"httpx2_sse": 100}
CONTENDERS = (FLOOR, OURS, "httpx2_sse")
QUANTITIES = {
    "cpu_per_event": ("reading", "microseconds of CPU an event", 1e6),
    "cpu_per_stream": ("opening", "microseconds of CPU a stream", 1e6),
    "bytes_per_stream": ("memory", "KiB an open stream", 1 / 1024),
}


def run(bench: Bench) -> Outcome:
    tasks, streams_of = {}, {}
    most = MOST | (QUICK if bench.quick else {})
    for streams in STREAMS[:-1] if bench.quick else STREAMS:
        events = max((5_000 if bench.quick else 10_000) // streams, 3) + 1
        plan = Plan(events=events, streams=streams, every_us=100 * streams, hold=1)
        arguments = {"skill": "caption", "plan": str(plan), "warm": str(Plan(events=100))}
        for name in CONTENDERS:
            if name in bench.names and streams <= most.get(name, streams):
                label = f"{bench.names[name]}, {streams:,}"
                tasks[label] = (name, "many", arguments)
                streams_of[label] = streams
    bench.say(f"{NAME}: up to {STREAMS[-1]:,} streams")
    found = bench.rounds(1 if bench.quick else 2, tasks, fresh=True, seldom={"httpx2_sse"})

    tables = []
    for key, (title, unit, factor) in QUANTITIES.items():
        samples = {
            label: [each[key] * factor for each in values]
            for label, values in found.items()
            # The memory of a few streams is less than what one request more or less takes.
            if key != "bytes_per_stream" or streams_of[label] >= 100
        }
        tables.append(Table(title, unit, samples, digits=1))
    reading, opening, _ = tables
    notes = growth(reading, "Reading an event") + growth(opening, "Opening one")
    return Outcome(NAME, TITLE, tables, targets(found), notes, draw=draw)


def targets(found: dict[str, list[Any]]) -> list[Target]:
    most = f"{load(OURS).NAME}, 10,000"
    delivered = min((each["delivered"] for each in found.get(most, ())), default=None)
    return [
        Target("10,000 streams open at once, delivered whole", delivered, 10_000, at_least=True)
    ]


def growth(table: Table, what: str) -> list[str]:
    """Tell how much more it costs with the most streams than with a hundred."""
    ratios = {
        name: table.ratio(f"{name}, 10,000", f"{name}, 100")
        for name in (load(OURS).NAME, load(FLOOR).NAME)
    }
    told = [f"{ratio:.2f} times for {name}" for name, ratio in ratios.items() if ratio]
    return [f"{what} of 10,000 streams, of one of 100: {', '.join(told)}."] if told else []


def draw(plt: Any, outcome: Outcome) -> Any:
    """Draw a line for each contender."""
    figure, all_axes = plt.subplots(1, len(outcome.tables), figsize=(14, 4.6), layout="constrained")
    figure.suptitle(outcome.title, fontsize=12, fontweight="bold")
    for axes, table in zip(all_axes, outcome.tables, strict=True):
        names = dict.fromkeys(label.rpartition(", ")[0] for label in table.samples)
        names = dict.fromkeys(name.rpartition(", ")[0] or name for name in names)
        for name in names:
            points = {
                int(label[len(name) + 2 :].replace(",", "")): values
                for label, values in table.samples.items()
                if label.startswith(f"{name}, ")
            }
            middle = [table.median(f"{name}, {count:,}") for count in points]
            low, high = zip(*(quartiles(values) for values in points.values()), strict=True)
            (line,) = axes.plot(list(points), middle, marker="o", label=name)
            axes.fill_between(list(points), low, high, alpha=0.15, color=line.get_color())
        axes.set_xscale("log")
        axes.set_xticks(STREAMS, [f"{count:,}" for count in STREAMS])
        axes.set_xlim(STREAMS[0] * 0.7, STREAMS[-1] * 1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("streams open at once")
        axes.set_title(f"{table.title}, {table.unit}", fontsize=10, loc="left")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].legend(fontsize=8, loc="lower left")
    return figure
