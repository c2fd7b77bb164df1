"""Plain calls with a small picture: how many a second?

The picture is 10 kB, and given to each client as it likes it best: the bodies of the bare
clients are made beforehand, this project's and the official SDK's are made in each call.
"""

from __future__ import annotations

from benchmarks.bench import Bench
from benchmarks.contenders import FLOOR, OURS
from benchmarks.results import Outcome, Table, Target

NAME = "calls"
TITLE = "Plain calls with a picture of 10 kB"
CONTENDERS = (FLOOR, OURS, "httpx_sse", "httpx2_sse", "official_sdk")
AT_ONCE = {1: 200, 50: 1_000, 500: 2_000}
AIM = {1: 0.85, 50: 0.75, 500: 0.7}
QUICK = {1: 100, 50: 400}
"""How many at once, and how many in all."""
SHARE = {"httpx_sse": 0.25, "httpx2_sse": 0.25, "official_sdk": 0.5}
MOST = {"httpx_sse": 50, "official_sdk": 50}
"""Beyond that, the one's pool takes half a minute, and the other would need as many threads."""


OBSTACLE = (
    "A call encodes its picture, sends the body in pieces that one deadline watches, passes the "
    "limits and the retries, and checks and types the answer, of all of which a bare post does "
    "nothing."
)


def run(bench: Bench) -> Outcome:
    tables, targets = [], []
    for at_once, count in (QUICK if bench.quick else AT_ONCE).items():
        bench.say(f"{NAME}: {at_once} at once")
        tasks = {}
        for name in CONTENDERS:
            if at_once > MOST.get(name, at_once):
                continue
            share = max(int(count * SHARE.get(name, 1)), at_once)
            tasks[name] = (name, "calls", {"at_once": at_once, "count": share})
        found = bench.rounds(5 if at_once < 500 and not bench.quick else 3, tasks)
        names = {name: bench.names[name].replace(" + httpx-sse", "") for name in found}
        names[FLOOR] = "floor: aiohttp, post"
        table = Table(
            f"{at_once} at once",
            "calls a second",
            {names[name]: [each["per_second"] for each in found[name]] for name in found},
            floor=names[FLOOR],
            us=names[OURS],
            digits=0,
        )
        tables.append(table)
        cpu = {names[name]: [each["cpu"] * 1e3 for each in found[name]] for name in found}
        tables.append(
            Table(f"{at_once} at once", "ms of CPU a call", cpu, floor=names[FLOOR], us=names[OURS])
        )
        ours = names[OURS]
        targets += [
            *(
                Target(
                    f"{at_once} at once: calls a second, of {other}'s",
                    table.ratio(ours, other),
                    2,
                    at_least=True,
                )
                for other in ("httpx", "httpx2")
                if other in table.samples
            ),
            Target(
                f"{at_once} at once: calls a second, of bare aiohttp's",
                table.ratio(ours, table.floor),
                AIM[at_once],
                at_least=True,
                obstacle=OBSTACLE,
            ),
        ]
    return Outcome(NAME, TITLE, tables, targets)
