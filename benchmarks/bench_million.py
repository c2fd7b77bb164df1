"""What does `bulk` need for a million pictures, and what grows with their number?

::

    python -m benchmarks.bench_million [--asked 1000 10000 100000] [--resumed 1000000]

The pictures are hard links to a JPEG of 10 kB, and the server, in a process of its own, costs
nothing. First the command asks about folders of more and more pictures. Then it is started
again on folders whose pictures all have their line, which is what going on after a crash near
the end costs: it looks at each file and asks about none. Lines of the largest folder are copies
of one that the command wrote, under other names. Shown are the processor's time for a picture,
the largest resident set, and the size of the file of lines.

What this leaves out: exports, other questions about the same pictures, and file systems that
take long to list a folder.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.scenarios.bulk import write_pictures

CONCURRENCY = "16"
MOST_LINKS = 50_000  # to one file, of those that file systems allow


def link(picture: Path, folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:07}.jpg"
        if number % MOST_LINKS == 0:
            picture = shutil.copy(picture, path)
        else:
            os.link(picture, path)


def run(folder: Path, output: Path, endpoint: str) -> tuple[float, float]:
    """Run the command in a process of its own; return its seconds of CPU, and its MB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_million",
        "--run",
        str(folder),
        str(output),
        endpoint,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    cpu, size = json.loads(done.stdout.splitlines()[-1])
    return cpu, size


def run_here(folder: str, output: str, endpoint: str) -> None:
    os.environ["MOONDREAM_ENDPOINT"] = endpoint
    command = ["-m", "moondream_async", "bulk", folder, "-o", output, "--concurrency", CONCURRENCY]
    subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))


def pretend(line: bytes, folder: Path, count: int, output: Path) -> None:
    """Write lines as if the command had asked about all pictures of a folder."""
    path = json.loads(line)["path"]
    before, after = line.split(path.encode(), 1)
    with output.open("wb") as file:
        for number in range(count):
            file.write(before + os.fsencode(folder / f"{number:07}.jpg") + after)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--asked", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--resumed", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_here(*arguments.run)
        return
    print("| pictures | | µs of CPU a picture | MB of memory | MB of lines |")
    print("| --- | --- | --- | --- | --- |")

    def show(count: int, what: str, cpu: float, size: float, output: Path) -> None:
        lines = output.stat().st_size / 1e6
        print(f"| {count:,} | {what} | {cpu / count * 1e6:,.0f} | {size:.0f} | {lines:.1f} |")

    with Bench(quick=True) as bench, tempfile.TemporaryDirectory() as place:
        endpoint = f"{bench.origin}/kind=call/v1"
        (picture,) = map(Path, write_pictures(Path(place), 1))
        first = b""
        for count in arguments.asked:
            folder, output = Path(place, f"asked{count}"), Path(place, f"asked{count}.jsonl")
            link(picture, folder, count)
            show(count, "asked", *run(folder, output, endpoint), output)
            show(count, "done already", *run(folder, output, endpoint), output)
            with output.open("rb") as file:
                first = file.readline()
        for count in arguments.resumed:
            folder, output = Path(place, f"done{count}"), Path(place, f"done{count}.jsonl")
            link(picture, folder, count)
            pretend(first, folder, count, output)
            show(count, "done already", *run(folder, output, endpoint), output)


if __name__ == "__main__":
    main()
