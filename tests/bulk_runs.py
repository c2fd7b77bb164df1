"""What the tests of the command ``bulk`` share; its fixtures are there without an import."""

import csv
import gzip
import html.parser
import io
import json
import subprocess
from collections import Counter

import pytest
from programs import running

ASKED = {"skill": "caption", "length": "normal"}


def make_pictures(folder, count):
    """Put pictures into a folder and one below it, each different from the others."""
    from PIL import Image

    (folder / "below").mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8 + number % 50, 8), (number % 256, 80, 20)).save(file, "JPEG")
        path = folder / ("below" if number % 2 else ".") / f"{number:05}.jpg"
        path.write_bytes(file.getvalue())
    return folder


@pytest.fixture
def photos(tmp_path):
    return make_pictures(tmp_path / "photos", 20)


@pytest.fixture
def bulk(cli, tmp_path):
    """Runs the command to its end; gives what it says on stderr, and looks at its exit status."""

    async def run(*args, status=0, **options):
        ended, output, said = await cli("bulk", *args, cwd=tmp_path, **options)
        assert (ended, output) == (status, ""), said
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def started(simulator, tmp_path):
    """Starts the command, and sees to it that it has ended; it says all on stdout."""

    def start(*args):
        options = {"cwd": tmp_path, "MOONDREAM_ENDPOINT": simulator.endpoint}
        return running("moondream-async", "bulk", *args, stderr=subprocess.STDOUT, **options)

    return start


def records(path):
    """The lines of a file of results; each has to be whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
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
