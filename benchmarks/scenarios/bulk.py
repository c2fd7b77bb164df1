"""A folder of small pictures, and a server that costs nothing: what does each picture cost?

Files of 10 kB are read from disk (from the system's memory, after the first round), encoded
and posted. The bare loop does just that, in workers; the official SDK opens each with Pillow
in a thread, as its documentation shows; the openai package and Hugging Face's client ask a
chat about each, in workers. The server is in a process of its own, and looks at
no picture.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.contenders import FLOOR, OURS
from benchmarks.results import Outcome, Table, Target

NAME = "bulk"
TITLE = "A folder of pictures of 10 kB"
AT_ONCE = (16, 256)
PICTURES, QUICK = 4_000, 1_000
MOST_OF_SDK = 16
"""Threads that it is given."""
MOST_OF_PEERS = 16


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write JPEGs of some 10 kB, each different."""
    from PIL import Image

    paths = []
    grain = Image.effect_noise((320, 240), 24).convert("RGB")
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        tint = Image.new("RGB", grain.size, (number % 256, number // 256 % 256, 99))
        Image.blend(tint, grain, 0.25).save(path, quality=85)
        paths.append(str(path))
    return paths


def run(bench: Bench) -> Outcome:
    tables, targets = [], []
    ours, floor = bench.names[OURS], "floor: aiohttp, read and post"
    by_calls = f"{ours}, caption in workers"
    sdk = bench.names.get("official_sdk", "official SDK")
    with tempfile.TemporaryDirectory() as name:
        paths = write_pictures(Path(name), QUICK if bench.quick else PICTURES)
        for at_once in AT_ONCE:
            bench.say(f"{NAME}: {at_once} at once")
            about = {"paths": paths, "at_once": at_once}
            tasks = {
                floor: (FLOOR, "bulk", about),
                ours: (OURS, "bulk", about),
                by_calls: (OURS, "bulk", about | {"way": "bulk_by_calls"}),
            }
            few = about | {"paths": paths[:1_000]}
            if at_once <= MOST_OF_SDK:
                tasks[sdk] = ("official_sdk", "bulk", few)
            for peer in ("openai_default", "openai_aiohttp", "huggingface"):
                if peer in bench.names and at_once <= MOST_OF_PEERS:
                    tasks[bench.names[peer]] = (peer, "bulk", few)
            found = bench.rounds(3 if bench.quick else 5, tasks)
            cpu = Table(
                f"{at_once} at once",
                "ms of CPU a picture",
                {label: [each["cpu"] * 1e3 for each in found[label]] for label in found},
                floor=floor,
                us=ours,
            )
            speed = Table(
                f"{at_once} at once",
                "pictures a second",
                {label: [each["per_second"] for each in found[label]] for label in found},
                floor=floor,
                us=ours,
                digits=0,
            )
            tables += [cpu, speed]
            targets += [
                Target(f"{at_once} at once: CPU of the bare loop's", cpu.ratio(ours, floor), 1.6),
                Target(
                    f"{at_once} at once: CPU of caption's in workers",
                    cpu.ratio(ours, by_calls),
                    1.1,
                ),
            ]
            if sdk in found:
                targets.append(
                    Target(
                        f"{at_once} at once: pictures a second, of the official SDK's",
                        speed.ratio(ours, sdk),
                        3,
                        at_least=True,
                    )
                )
    return Outcome(NAME, TITLE, tables, targets)
