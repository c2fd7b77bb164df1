"""A picture of 12 megapixels, until it is ready to be sent; `bench_images.py` has more of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import bench_images
from benchmarks.bench import Bench
from benchmarks.results import Outcome, Table, Target

NAME = "pictures"
TITLE = "A picture of 12 megapixels"
AGAIN = "decode and encode again"
CONTENDERS = ("idle", AGAIN, "JPEG path", "JPEG bytes", "Pillow RGB photo")


def run(bench: Bench) -> Outcome:
    bench.say(f"{NAME}: {len(CONTENDERS)} ways")
    times: dict[str, list[float]] = {}
    stalls: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bench_images.make_pictures(directory)
        for _ in range(1 if bench.quick else 2):
            for contender in CONTENDERS:
                found = bench_images.measure_apart(contender, directory, 3 if bench.quick else 5)
                times.setdefault(contender, []).extend(found["times"])
                stalls.setdefault(contender, []).extend(found["stalls"])
    del times["idle"]

    def table(title: str, samples: dict[str, list[float]]) -> Table:
        in_ms = {what: [value * 1e3 for value in values] for what, values in samples.items()}
        return Table(title, "ms", in_ms, us="JPEG path")

    ready = table("until it is ready", times)
    stall = table("the loop's longest stall meanwhile", stalls)
    targets = [
        Target(f"{AGAIN}, times {what}", ready.ratio(AGAIN, what), 20, at_least=True)
        for what in ("JPEG path", "JPEG bytes")
    ]
    return Outcome(NAME, TITLE, [ready, stall], targets)
