"""Pictures that must be made smaller: a phone's photo, and a camera's frame.

Beside Pillow's plain way, all in a worker's thread and by its CPU time: what else the
machine does is in neither. The ways take turns.
"""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import bench_images
from benchmarks.bench import Bench
from benchmarks.results import Outcome, Table, Target

NAME = "photos"
TITLE = "A picture that is made smaller"
US, PILLOW = "moondream_async", "Pillow, plain"
PHOTO_PIXELS, FRAME_PIXELS = 2_000_000, 1_000_000
PHOTOS = 40


def ways(directory: Path) -> dict[str, dict[str, Callable[[], object]]]:
    """Return the ways to prepare each kind of picture, with all they need loaded."""
    import numpy as np
    from PIL import Image

    from moondream_async._images import encode_image

    path = directory / "photo.jpg"
    frame = np.array(bench_images.photo().resize((1920, 1080)))

    def saved(picture: Any, pixels: int) -> bytes:
        scale = (pixels / (picture.width * picture.height)) ** 0.5
        file = io.BytesIO()
        size = int(picture.width * scale), int(picture.height * scale)
        picture.resize(size).save(file, "JPEG", quality=90)
        return file.getvalue()

    def drafted() -> bytes:
        with Image.open(path) as picture:
            picture.draft("RGB", (1632, 1224))
            return saved(picture, PHOTO_PIXELS)

    return {
        "a JPEG of 12 megapixels to 2": {
            PILLOW: drafted,
            US: lambda: encode_image(path, max_pixels=PHOTO_PIXELS),
        },
        "a frame of 1080p to 1 megapixel": {
            PILLOW: lambda: saved(Image.fromarray(frame), FRAME_PIXELS),
            US: lambda: encode_image(frame, max_pixels=FRAME_PIXELS),
            f"{US}, OpenCV's frame": lambda: encode_image(
                frame[:, :, ::-1], max_pixels=FRAME_PIXELS
            ),
        },
    }


def timed(way: Callable[[], object]) -> float:
    """Return the milliseconds of CPU that it takes."""
    begun = time.thread_time()
    way()
    return (time.thread_time() - begun) * 1e3


def cores_used(origin: str, path: Path) -> float:
    """Return how many processors a bulk run keeps busy whose pictures all are made smaller."""
    import moondream_async as md

    async def main() -> None:
        async with md.MoondreamClient(endpoint=origin, max_pixels=PHOTO_PIXELS) as client:
            async for done in client.bulk([path] * PHOTOS, "caption"):
                assert done.ok

    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(main())
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def run(bench: Bench) -> Outcome:
    bench.say(f"{NAME}: a photo and a frame")
    tables, targets = [], []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as worker:
        directory = Path(name)
        bench_images.photo().save(directory / "photo.jpg", quality=90)
        for kind, found in ways(directory).items():
            samples: dict[str, list[float]] = {label: [] for label in found}
            for _ in range(5 if bench.quick else 25):
                for label, way in found.items():
                    samples[label].append(worker.submit(timed, way).result())
            table = Table(f"{kind}, ms of a worker", "ms", samples, floor=PILLOW, us=US)
            tables.append(table)
            targets.append(Target(f"{kind}, of Pillow's", table.ratio(US, PILLOW), 1.1))
        origin = f"{bench.origin}/kind=call/v1"
        used = [cores_used(origin, directory / "photo.jpg") for _ in range(3)]
    frame = tables[-1].median(US)
    tables.append(Table("bulk, photos of 12 megapixels to 2", "processors used", {US: used}))
    share = statistics.median(used) / (os.cpu_count() or 1)
    targets.append(Target("bulk: processors used, of those there are", share, 0.9, at_least=True))
    obstacle = "copying takes 2 ms, two samples a pixel 6, libjpeg 6; the rest is fresh memory"
    targets.append(Target("a frame of 1080p, ms of a worker", frame, 15, obstacle=obstacle))
    return Outcome(NAME, TITLE, tables, targets)
