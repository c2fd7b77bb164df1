"""What the tests of the command line share; its fixtures are there without an import.

A command runs in this process, against a simulator in a thread. Only a test about signals,
terminals and closed streams runs a program in a process of its own: see `programs`.
"""

import contextlib
import csv
import gzip
import html.parser
import io
import json
import os
import subprocess
import threading
from collections import Counter
from functools import cache

import anyio
import pytest
from programs import running

import moondream_async as md
from moondream_async.cli import main


@pytest.fixture
def command(moondream_simulator, tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder of its own; gives its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    # Between two looks at a batch: a server that goes on with each look needs no time.
    monkeypatch.setitem(md.Batches.wait.__kwdefaults__, "interval", 0.01)

    def run(*args, stdin=b"", **environment):
        with monkeypatch.context() as patch, on_stdin(stdin) as file:
            patch.setattr("sys.stdin", file)
            for name, value in environment.items():
                patch.setenv(name, value)
            status = main([*map(str, args)])
        return (status, *capsys.readouterr())

    return run


@contextlib.contextmanager
def on_stdin(data):
    """Give a command something to read, at most what a pipe holds."""
    before, (ours, its) = os.dup(0), os.pipe()
    os.write(its, data)
    os.close(its)
    os.dup2(ours, 0)
    os.close(ours)
    try:
        with open(0, encoding="utf-8", closefd=False) as file:
            yield file
    finally:
        os.dup2(before, 0)
        os.close(before)


@contextlib.contextmanager
def meanwhile(act):
    """Do something in a thread while the command runs."""
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


# -- bulk ------------------------------------------------------------------------------

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
