"""From the call to the first piece of text: what does each client add to the raw reader?

The server answers at once, so that nothing is measured but the clients: making the
request, sending it, and taking the answer up to its first event. Connections are open
already. All read the chat stream, which all of them know.
"""

from __future__ import annotations

import statistics

from benchmarks.bench import Bench
from benchmarks.contenders import FLOOR, OURS, RAW
from benchmarks.results import Outcome, Table, Target
from benchmarks.wire import Plan

NAME = "first"
TITLE = "From the call to the first chunk"
CONTENDERS = (RAW, FLOOR, OURS, "openai_default", "openai_aiohttp")
AT_ONCE = {1: 100, 500: 1}
QUICK = {1: 50, 100: 1}
"""How many streams begin at once, and how often."""


def run(bench: Bench) -> Outcome:
    plan = str(Plan(kind="first", events=8))
    tables, targets = [], []
    for at_once, times in (QUICK if bench.quick else AT_ONCE).items():
        bench.say(f"{NAME}: {at_once} at once")
        arguments = {"skill": "chat", "plan": plan, "at_once": at_once, "times": times}
        tasks = {name: (name, "first", arguments) for name in CONTENDERS}
        rounds = 3 if at_once == 1 else 2
        found = bench.rounds(rounds, tasks)
        names = {name: bench.names[name] for name in found}
        for word, measure in (("median", statistics.median), ("99th percentile", percentile_99)):
            floors = [measure(delays) for delays in found[RAW]]
            table = Table(
                f"{at_once} at once, {word}, added to the raw reader's",
                "ms",
                {
                    names[name]: [
                        (measure(delays) - floor) * 1e3
                        for delays, floor in zip(found[name], floors, strict=False)
                    ]
                    for name in found
                    if name != RAW
                },
                floor=names[FLOOR],
                us=names[OURS],
                digits=3,
            )
            raw = statistics.median(floors) * 1e3
            table.title += f" ({raw:.2f} ms)"
            tables.append(table)
            targets += [
                Target(
                    f"{at_once} at once: added delay, {word}, of {other}'s",
                    table.ratio(names[OURS], other),
                    0.5,
                )
                for other in ("openai", "openai, aiohttp")
            ]
            if at_once > 1:
                targets.append(
                    Target(
                        f"{at_once} at once: added delay, {word}, of the aiohttp floor's",
                        table.ratio(names[OURS], table.floor),
                        1.5,
                    )
                )
    return Outcome(NAME, TITLE, tables, targets)


def percentile_99(delays: list[float]) -> float:
    return statistics.quantiles(delays, n=100, method="inclusive")[-1]
