"""What the tests of the command ``bulk`` share; its fixtures are there without an import."""

import csv
import gzip
import html.parser
import io
import json
import subprocess
from collections import Counter
from functools import cache

import anyio
import pytest
from programs import running

ASKED = {"skill": "caption", "length": "normal"}


@cache
def picture(number=0):
    """A small JPEG, different from those of other numbers."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8 + number % 50, 8), (number % 256, 80, 20)).save(file, "JPEG")
    return file.getvalue()


def make_pictures(folder, count):
    """Put pictures into a folder and one below it, each different from the others."""
    (folder / "below").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / ("below" if number % 2 else ".") / f"{number:05}.jpg"
        path.write_bytes(picture(number))
    return folder


@pytest.fixture
def photos(tmp_path):
    return make_pictures(tmp_path / "photos", 20)


@pytest.fixture
def bulk(command):
    """Runs ``bulk``; gives what it says on stderr, and looks at its exit status."""

    def run(*args, status=0, **options):
        ended, output, said = command("bulk", *args, **options)
        assert (ended, output) == (status, ""), said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def memory():
    """A file system of fsspec, in this process."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/set", recursive=True)


@pytest.fixture
def bulk_until(moondream_simulator, tmp_path):
    """Runs ``bulk`` in a process, and ends it `when` it has said or has asked so much."""

    def run(*args, when, end):
        async def until():
            command = ("moondream-async", "bulk", *args)
            async with running(*command, cwd=tmp_path, stderr=subprocess.STDOUT) as program:
                if isinstance(when, str):
                    await program.until(when)
                else:
                    requests = moondream_simulator.requests
                    await moondream_simulator.until(lambda: len(requests) >= when, timeout=60)
                await end(program)
                return (await program.end())[0]

        return anyio.run(until)

    return run


async def interrupt(program):
    program.interrupt()


async def kill(program):
    program.kill()


def records(path):
    """The lines of a file of results; each has to be whole."""
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def paths_of(found):
    return sorted(record["path"] for record in found)


def rows_of(output):
    """The paths and captions in a file, or a folder of texts, of any form."""
    if output.is_dir():
        return [(f"photos/{path.stem}", path.read_text().strip()) for path in output.rglob("*.txt")]
    if output.suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
    elif output.suffix == ".jsonl":
        rows = records(output)
    elif output.name.endswith(".jsonl.gz"):
        rows = map(json.loads, gzip.decompress(output.read_bytes()).splitlines())
    else:
        opened = gzip.open if output.suffix == ".gz" else open
        with opened(output, "rt", newline="") as file:
            rows = list(csv.DictReader(file))
    return [(row["path"], row["caption"]) for row in rows]


class Page(html.parser.HTMLParser):
    """What a page shows, and what it would load."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.loaded, self.text = Counter(), [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data
