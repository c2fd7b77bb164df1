"""How fast is a 12-megapixel picture ready to be sent, and how long does the loop stand still?

Compares `encode_image` with decoding a JPEG and encoding it again at quality 95,
which is what sending any Pillow image comes to. Then runs it in a worker thread
beside an event loop that ticks every millisecond, and reports the longest
lateness of a tick. Each contender has a fresh process; the idle loop's lateness
is the machine's own and is in all the others.

    python benchmarks/bench_images.py [--repeat 15]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 4032, 3024  # a phone's 12 megapixels


def photo(mode: str = "RGB") -> Any:
    """Make a picture with a photo's detail: soft shapes and noise."""
    from PIL import Image

    randbytes = random.Random(12).randbytes
    coarse = Image.frombytes("RGB", (WIDTH // 42, HEIGHT // 42), randbytes(96 * 72 * 3))
    fine = Image.frombytes("RGB", (WIDTH // 4, HEIGHT // 4), randbytes(1008 * 756 * 3))
    size = (WIDTH, HEIGHT)
    shapes = coarse.resize(size, Image.Resampling.BICUBIC)
    return Image.blend(shapes, fine.resize(size, Image.Resampling.BICUBIC), 0.15).convert(mode)


def drawing() -> Any:
    """Make a picture of few colours."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    for step in range(0, HEIGHT, 36):
        pen.line((0, step, WIDTH, HEIGHT - step), fill=(step % 256, 40, 90), width=3)
    return picture


def prepare(contender: str, directory: Path) -> Callable[[], object]:
    """Return what is to be measured, with all that it needs loaded."""
    from PIL import Image

    from moondream_async._images import encode_image

    path = directory / "photo.jpg"
    data = path.read_bytes()

    def again() -> bytes:
        file = io.BytesIO()
        with Image.open(io.BytesIO(data)) as picture:
            picture.convert("RGB").save(file, "JPEG", quality=95)
        return file.getvalue()

    def of(picture: Any) -> Callable[[], object]:
        return lambda: encode_image(picture)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "idle": lambda: lambda: time.sleep(0.05),
        "decode and encode again": lambda: again,
        "JPEG path": lambda: of(path),
        "JPEG bytes": lambda: of(data),
        "JPEG on its side": lambda: of(directory / "sideways.jpg"),
        "JPEG, max_pixels 2 million": lambda: lambda: encode_image(path, max_pixels=2_000_000),
        "PNG path": lambda: of(directory / "drawing.png"),
        "Pillow RGB photo": lambda: of(photo()),
        "Pillow RGBA photo": lambda: of(photo("RGBA")),
        "Pillow CMYK photo": lambda: of(photo("CMYK")),
        "Pillow I photo": lambda: of(photo("L").convert("I")),
        "Pillow RGB drawing": lambda: of(drawing()),
    }
    return makers[contender]()


CONTENDERS = (
    "idle",
    "decode and encode again",
    "JPEG path",
    "JPEG bytes",
    "JPEG on its side",
    "JPEG, max_pixels 2 million",
    "PNG path",
    "Pillow RGB photo",
    "Pillow RGBA photo",
    "Pillow CMYK photo",
    "Pillow I photo",
    "Pillow RGB drawing",
)


async def longest_stall(work: Callable[[], object]) -> float:
    """Run `work` in a thread; return the longest lateness of a tick, in seconds."""
    period = 0.001
    running = asyncio.get_running_loop().run_in_executor(None, work)
    worst = 0.0
    while not running.done():
        begun = time.perf_counter()
        await asyncio.sleep(period)
        worst = max(worst, time.perf_counter() - begun - period)
    await running
    return worst


def peak_memory(work: Callable[[], object]) -> int | None:
    """Run `work`; return by how many KiB the process grew meanwhile, where Linux tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        return None

    def kib(field: str) -> int:
        return int(Path("/proc/self/status").read_text().partition(field)[2].split()[0])

    before = kib("VmRSS:")
    work()
    return kib("VmHWM:") - before


def measure(contender: str, directory: Path, repeat: int) -> dict[str, Any]:
    """Time one contender in this process."""
    work = prepare(contender, directory)
    peak = peak_memory(work)
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    stalls = [asyncio.run(longest_stall(work)) for _ in range(repeat)]
    return {"times": times, "stalls": stalls, "peak_kib": peak}


def make_pictures(directory: Path) -> None:
    """Write the files that the contenders read."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 1
    photo().save(directory / "photo.jpg", quality=90, exif=exif)
    exif[0x0112] = 6
    photo().save(directory / "sideways.jpg", quality=90, exif=exif)
    drawing().save(directory / "drawing.png")


def measure_apart(contender: str, directory: Path, repeat: int) -> dict[str, Any]:
    """Do what `measure` does, in a process of its own."""
    child = [sys.executable, __file__, "--repeat", str(repeat), "--one", contender, str(directory)]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "DIRECTORY"), help="as a child")
    options = parser.parse_args()
    if options.one:
        contender, directory = options.one
        print(json.dumps(measure(contender, Path(directory), options.repeat)))
        return

    import PIL

    print(f"Python {platform.python_version()}, Pillow {PIL.__version__}, {platform.machine()}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_pictures(directory)
        for file in sorted(directory.iterdir()):
            print(f"{file.name}: {WIDTH}x{HEIGHT}, {file.stat().st_size:,} bytes")
        print(f"\n{'':28}{'best ms':>9}{'median':>9}{'stall ms':>10}{'worst':>7}{'peak MiB':>10}")
        best = {}
        for contender in CONTENDERS:
            result = measure_apart(contender, directory, options.repeat)
            times, stalls = result["times"], result["stalls"]
            best[contender] = min(times)
            print(
                f"{contender:28}{min(times) * 1e3:9.1f}{statistics.median(times) * 1e3:9.1f}"
                f"{statistics.median(stalls) * 1e3:10.1f}{max(stalls) * 1e3:7.1f}"
                f"{(result['peak_kib'] or 0) / 1024:10.1f}"
            )
    again = best["decode and encode again"]
    for contender in ("JPEG path", "JPEG bytes"):
        print(f"{contender} is {again / best[contender]:.0f} times as fast as encoding again")
    print("stall: the longest lateness of a tick in one run; median and worst of all runs")


if __name__ == "__main__":
    main()
