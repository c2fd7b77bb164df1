"""One event of 1, 2, 4 and 8 MB in small packets: does its time grow in proportion?

Over a socket in HTTP chunks of 1,000 bytes, of which the kernel hands over many at once;
and fed to this project's decoder in packets of 100 bytes, which no kernel joins. The
aiohttp floor isn't here, since it joins what it has with each packet, and is quadratic;
nor is aiohttp's `async for line`, which refuses such a line.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.contenders import OURS, RAW
from benchmarks.results import Outcome, Table, Target
from benchmarks.wire import Plan

NAME = "large"
TITLE = "One large event in small packets"
MEGABYTES = (1, 2, 4, 8)
CONTENDERS = (RAW, OURS, "official_sdk", "httpx2_sse")
DECODER = "moondream_async's decoder alone, packets of 100 bytes"
MOST = {"httpx2_sse": 2}


OBSTACLE = (
    "1 MB fits into the processor's caches and 8 MB do "
    "not, and with few rounds other programs weigh on the one more than on the other."
)


def run(bench: Bench) -> Outcome:
    bench.say(f"{NAME}: up to {MEGABYTES[-1]} MB")
    tasks: dict[str, Any] = {}
    for name in CONTENDERS:
        for megabytes in MEGABYTES:
            if name in bench.names and megabytes <= MOST.get(name, megabytes):
                plan = Plan(kind="large", events=megabytes * 1_000_000, per=1_000)
                arguments = {"skill": "caption", "plan": str(plan), "warm": str(Plan(events=9))}
                tasks[f"{bench.names[name]}, {megabytes} MB"] = (name, "stream", arguments)
    for megabytes in MEGABYTES:
        arguments = {"size": megabytes * 1_000_000, "packet": 100}
        tasks[f"{DECODER}, {megabytes} MB"] = (OURS, "decode", arguments)
    found = bench.rounds(2 if bench.quick else 5, tasks)
    samples = {label: [each["cpu"] * 1e3 for each in values] for label, values in found.items()}
    table = Table("time", "ms of CPU", samples, digits=1)
    targets = [
        Target(f"8 MB, of eight times 1 MB: {name}", eight / 8, 1.25, obstacle=OBSTACLE)
        for name in (bench.names[OURS], DECODER)
        if (eight := table.ratio(f"{name}, 8 MB", f"{name}, 1 MB"))
    ]
    return Outcome(NAME, TITLE, [table], targets, draw=draw)


def draw(plt: Any, outcome: Outcome) -> Any:
    """Draw time against size, each contender a line."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    (table,) = outcome.tables
    for name in dict.fromkeys(label.rpartition(", ")[0] for label in table.samples):
        sizes = [size for size in MEGABYTES if f"{name}, {size} MB" in table.samples]
        times = [table.median(f"{name}, {size} MB") for size in sizes]
        axes.plot(sizes, times, marker="o", label=name)
        axes.plot(MEGABYTES, [times[0] * size for size in MEGABYTES], color="#adb5bd", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(MEGABYTES, [f"{size} MB" for size in MEGABYTES])
    axes.set_ylabel("ms of CPU")
    axes.set_title(f"{outcome.title}\ngrey: in proportion to 1 MB", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    return figure
