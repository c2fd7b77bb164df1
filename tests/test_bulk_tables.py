"""``bulk`` over tables, with several questions, and what it tells before and afterwards."""

import csv
import json
import sys
import zipfile

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bulk_runs import records
from PIL import Image

from moondream_async.cli.bulk.estimate import Estimate
from moondream_async.cli.bulk.pending import Pending
from moondream_async.cli.bulk.questions import Questions
from moondream_async.cli.bulk.search import Search
from moondream_async.cli.bulk.sources import Found, PictureFile
from moondream_async.errors import MissingExtraError

pytestmark = pytest.mark.slow  # each test runs the program several times

ASKS = ("--ask", "size=How wide is it?", "--ask", "kind=Is it a {kind}?")


def write_table(path, rows):
    """Write rows in the form that the file's name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(rows), str(path)
        )
    return path.name


def rows_of(photos):
    return [
        {"picture": str(path), "kind": f"{number:02} cat", "id": str(number)}
        for number, path in enumerate(sorted(photos.rglob("*.jpg")))
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
async def test_a_table_gives_pictures_and_its_columns_go_into_questions(
    simulator, bulk, photos, tmp_path, ending
):
    table = write_table(tmp_path / f"in.{ending}", rows_of(photos))
    for run in range(2):
        said = await bulk(table, "-o", "out.csv", *ASKS)
        assert ("20 answered, 0 failed" if run == 0 else "20 done before") in said
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20
    assert all(row["size"] and row["kind"] and row["row.kind"] and row["id"] for row in rows)
    asked = [each.body["question"] for each in simulator.requests]
    assert sorted(asked) == sorted(
        ["How wide is it?"] * 20 + [f"Is it a {number:02} cat?" for number in range(20)]
    )


@pytest.mark.parametrize("source", ["photos", "in.csv"])
async def test_braces_that_name_no_column_are_text(simulator, bulk, photos, tmp_path, source):
    write_table(tmp_path / "in.csv", rows_of(photos))
    texts = ['Answer as {"a": 1}', "Answer {}", "Only {in one word}"]
    for text in texts:
        await bulk(source, "-o", "o.jsonl", "--skill", "query", "--question", text, "--limit", 2)
    assert [each.body["question"] for each in simulator.requests] == [
        text for text in texts for _ in range(2)
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
async def test_a_row_without_a_picture_fails_alone(simulator, bulk, photos, tmp_path, ending):
    rows = [{"picture": str(each), "kind": "cat"} for each in sorted(photos.rglob("*.jpg"))[:3]]
    rows[1:1] = [{"picture": "", "kind": "blank"}, {"picture": None, "kind": "none"}]
    if ending == "jsonl":
        rows += [{"kind": "a key less"}, {"picture": 5, "kind": "a number"}]
    table = write_table(tmp_path / f"in.{ending}", rows)
    bad = len(rows) - 3
    for done in (f"3 answered, {bad} failed", f"0 answered, {bad} failed, 3 done before"):
        said = await bulk(table, "-o", "o.jsonl", "--report", "o.html", *ASKS, status=1)
        assert done in said
        assert "names no picture in picture" in said
    failed = [line for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert len(failed) == bad
    assert [line["path"] for line in failed[:2]] == [f"{table}#row=2", f"{table}#row=3"]
    assert len(simulator.requests) == 6


async def test_only_questions_that_failed_are_asked_again(simulator, bulk, photos, tmp_path):
    arguments = ("photos", "-o", "o.jsonl", "--ask", "a=How wide?", "--ask", "b=How high?")
    simulator.faults.extend(["status=400"] * 5)
    said = await bulk(*arguments, status=1)
    assert "failed: BadRequestError" in said
    failed = sum("error" in line for line in records(tmp_path / "o.jsonl"))
    simulator.requests.clear()
    said = await bulk(*arguments)
    assert f"{failed} answered, 0 failed, {20 - failed} done before" in said
    assert len(simulator.requests) == 5
    lines = records(tmp_path / "o.jsonl")
    assert len(lines) == 20
    assert all(line["a"] and line["b"] for line in lines)


async def test_what_a_run_would_take_is_told_and_nothing_asked(simulator, cli, photos, tmp_path):
    options = ("--dry-run", "--rate-limit", 2, "--limit", 10)
    _, said, _ = await cli("bulk", "photos", "-o", "o.jsonl", *options, cwd=tmp_path)
    assert "10 pictures to ask about" in said
    assert "10 requests; 0 done before" in said
    assert "tokens, which cost $" in said
    assert "about 0:05 at 2 requests a second" in said
    assert simulator.requests == []
    assert not (tmp_path / "o.jsonl").exists()


async def test_a_limit_stops_after_so_many_and_the_next_run_goes_on(bulk, photos, tmp_path):
    for done in (0, 8, 16):
        said = await bulk("photos", "-o", "o.jsonl", "--limit", 8)
        assert f"{min(8, 20 - done)} answered" in said
    assert len(records(tmp_path / "o.jsonl")) == 20


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--include", "below/*"], 10),
        (["--exclude", "*1.jpg"], 18),
        (["--include", "0000?.jpg", "--exclude", "below/*"], 5),
    ],
)
async def test_pictures_are_chosen_by_their_names(bulk, photos, tmp_path, options, count):
    await bulk("photos", "-o", "o.jsonl", *options)
    assert len(records(tmp_path / "o.jsonl")) == count


async def test_a_server_that_is_away_ends_the_run_after_its_first_failures(
    bulk, photos, tmp_path, nobody
):
    arguments = ("photos", "-o", "o.jsonl", "--retries", 0)
    said = await bulk(*arguments, MOONDREAM_ENDPOINT=nobody, status=1)
    assert "Stopped after 3 failures in a row" in said
    assert len(records(tmp_path / "o.jsonl")) < 20


async def test_boxes_are_coco_and_yolo_as_others_read_them(bulk, photos, tmp_path):
    supervision = pytest.importorskip("supervision")
    coco = pytest.importorskip("pycocotools.coco")
    for path in photos.rglob("*.jpg"):
        path.unlink()
    for number in range(3):
        red = Image.new("RGB", (40, 80), "white")
        red.paste("red", (10, 10, 30, 30))
        red.save(photos / f"red{number}.png")
    asked = ("photos", "--skill", "detect", "--object", "red")
    said = await bulk(*asked, "-o", "boxes.coco.json")
    lines = records(tmp_path / "boxes.coco.json.jsonl")
    (box,) = lines[0]["objects"]
    read = coco.COCO(str(tmp_path / "boxes.coco.json"))
    assert len(read.getImgIds()) == len(read.getAnnIds()) == 3
    annotation = read.anns[1]
    assert annotation["bbox"] == pytest.approx(
        [
            box["x_min"] * 40,
            box["y_min"] * 80,
            (box["x_max"] - box["x_min"]) * 40,
            (box["y_max"] - box["y_min"]) * 80,
        ],
        abs=0.01,
    )
    said = await bulk(*asked, "-o", "yolo/")
    data = supervision.DetectionDataset.from_yolo(
        str(photos), str(tmp_path / "yolo/labels"), str(tmp_path / "yolo/data.yaml")
    )
    assert data.classes == ["red"]
    for _, _, detections in data:
        assert detections.xyxy[0] == pytest.approx(
            [box["x_min"] * 40, box["y_min"] * 80, box["x_max"] * 40, box["y_max"] * 80], abs=0.01
        )
    said = await bulk(*asked, "-o", "yolo/")
    assert "3 done before" in said


@pytest.fixture
async def web_folder(photos):
    application = web.Application()
    application.router.add_static("/photos", photos)
    async with TestServer(application) as server:
        yield str(server.make_url("/photos"))


@pytest.mark.parametrize("way", ["zip", "member", "http", "table of http"])
async def test_pictures_elsewhere_are_read_when_their_turn_comes(
    bulk, photos, tmp_path, *, web_folder, way
):
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for path in photos.rglob("*.jpg"):
            archive.write(path, path.relative_to(photos))
        archive.writestr("notes.txt", "none")
    address = f"{web_folder}/00000.jpg"
    source, count = {
        "zip": ("p.zip", 20),
        "member": (f"zip://below/00001.jpg::{tmp_path}/p.zip", 1),
        "http": (address, 1),
        "table of http": ("in.csv", 1),
    }[way]
    write_table(tmp_path / "in.csv", [{"url": address}])
    allowed = ("--allow-network", "127.0.0.0/8") if "http" in way else ()
    if allowed:  # whoever wrote the table is not let into this network
        said = await bulk(source, "-o", "o.jsonl", status=1)
        assert "is not on the public internet" in said
    for said_of in (f"{count} answered, 0 failed", f"{count} done before"):
        said = await bulk(source, "-o", "o.jsonl", *allowed)
        assert said_of in said
    said = await bulk(source, "-o", "texts/", *allowed)
    assert len(list((tmp_path / "texts").rglob("*.txt"))) == count


def test_a_file_system_of_fsspec_is_listed_folder_by_folder():
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for name in ("a.jpg", "b/c.png", "b/notes.txt", "b/.hidden.jpg"):
        files.pipe(f"/set/{name}", b"x")
    found = [(each.path, each.below) for each in Search().find(["memory://set"])]
    assert sorted(found) == [("memory:///set/a.jpg", "a.jpg"), ("memory:///set/b/c.png", "b/c.png")]
    assert {PictureFile(each).read() for each in Search().find(["memory://set"])} == {b"x"}
    assert len(list(Search().find(["memory://set/*.jpg"]))) == 1
    estimate = Estimate(Questions("caption", {}, {}, None))
    for each in Search().find(["memory://set"]):
        estimate.add(Pending(each, {}, {}))
    assert (estimate.pictures, estimate.size, estimate.refused) == (2, 2, 0)
    search = Search()
    assert len(list(search.find(["memory://set"]))) == 2
    assert search.left_out == {".txt": 1}
    files.rm("/set", recursive=True)


@pytest.mark.parametrize("heif", [True, False])
def test_a_folder_gives_what_can_be_prepared_and_counts_the_rest(tmp_path, monkeypatch, heif):
    monkeypatch.setattr("moondream_async._images.formats.has_heif", lambda: heif)
    for name in ("a.JPG", "b.HEIC", "c.pnm", "d.psd", "e.txt", "none", ".hidden.jpg"):
        (tmp_path / name).touch()
    search = Search()
    found = {each.below for each in search.find([str(tmp_path)])}
    assert found == {"a.JPG", "c.pnm"} | ({"b.HEIC"} if heif else set())
    assert search.left_out == {".psd": 1, ".txt": 1, "": 1} | ({} if heif else {".heic": 1})
    several = search.find(iter([str(tmp_path), "never reached"]))
    assert next(several).path.startswith(str(tmp_path)), "it takes no more than it is asked for"


@pytest.mark.parametrize(
    "address", ["zip://a.jpg::http://127.0.0.1/p.zip", "simplecache::HTTP://10.0.0.1/a.jpg"]
)
def test_no_chain_goes_around_the_guard_of_the_web(address):
    pytest.importorskip("fsspec")
    with pytest.raises(OSError, match="on the web is not read"):
        PictureFile(Found(address, "a.jpg")).read()


@pytest.mark.parametrize("source", ["s3://a/b.jpg", "in.parquet"])
def test_an_extra_that_is_missing_is_named(tmp_path, monkeypatch, source):
    for name in ("fsspec.core", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.parquet").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'moondream-async\["):
        list(Search().find([source]))
