"""What ``bulk`` writes and goes on from: nothing lost, nothing twice, nothing overwritten."""

import contextlib
import errno as errnos
import fcntl
import hashlib
import itertools
import json
import os
import resource
import shlex
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from bulk_runs import ASKED, Page, make_pictures, paths_of, picture, records, rows_of
from commands import meanwhile
from PIL import Image
from programs import PROGRAM
from raw_server import whole
from remote_server import serving, serving_pages

pytestmark = pytest.mark.slow  # on one Python version

# -- the journal -------------------------------------------------------------------


@pytest.mark.parametrize("output", ["o.csv", "o.jsonl.gz"])
def test_a_picture_that_fails_is_a_line_until_it_is_mended(bulk, photos, tmp_path, output):
    journal, arguments = tmp_path / f"{output}.jsonl", ("-o", output, "--report", "report.html")
    (photos / "00000.jpg").write_bytes(picture()[:20])
    (photos / "empty.png").write_bytes(b"")
    said = bulk("photos", "missing.jpg", *arguments, status=1)
    assert "19 answered, 3 failed" in said
    assert "19 answered, 3 failed." in Page(tmp_path / "report.html").text
    failed = [line for line in records(journal) if "error" in line]
    assert paths_of(failed) == ["missing.jpg", "photos/00000.jpg", "photos/empty.png"]
    assert all(line["error"]["type"] == "ImageError" for line in failed)
    for path in (photos / "00000.jpg", photos / "empty.png", tmp_path / "missing.jpg"):
        path.write_bytes(picture())
    said = bulk("photos", "missing.jpg", *arguments)
    assert "3 answered, 0 failed, 19 done before" in said
    assert "22 answered, 0 failed." in Page(tmp_path / "report.html").text
    rows = rows_of(tmp_path / output)
    assert len(records(journal)) == len(rows) == 22
    assert all(caption for _, caption in rows)


def is_locked(path):
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_one_run_at_a_time_writes_a_file_of_lines_also_while_it_is_replaced(
    bulk, photos, tmp_path, monkeypatch
):
    lines, replaced, replace = tmp_path / "o.jsonl", [], os.replace
    (photos / "00000.jpg").write_bytes(b"")
    bulk("photos", "-o", "o.jsonl", status=1)
    with lines.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "Another run is writing o.jsonl" in bulk("photos", "-o", "o.jsonl", status=1)

    def look(new, old):
        replace(new, old)
        replaced.append(is_locked(lines))

    monkeypatch.setattr(os, "replace", look)
    (photos / "00000.jpg").write_bytes(picture())
    bulk("photos", "-o", "o.jsonl")
    assert (replaced, is_locked(lines)) == ([True], False)


TORN = b'{"path":"b.jpg","skill":"caption","length":"normal","caption":"b"}'


def test_what_a_lost_run_left_behind_its_lines_is_mended(bulk, photos, tmp_path):
    file, one = tmp_path / "o.jsonl", ("photos/00000.jpg", "-o", "o.jsonl")
    bulk(*one)
    whole = file.read_bytes()
    for tail in (b"\0" * 40, TORN[:1], TORN[:12], TORN[:10] + b"\0\0", TORN[:-1]):
        file.write_bytes(whole + tail)
        assert "0 answered, 0 failed, 1 done before" in bulk(*one)
        assert file.read_bytes() == whole
    file.write_bytes(whole.rstrip(b"\n"))  # by an editor
    assert "1 answered, 0 failed, 1 done before" in bulk("photos/00002.jpg", *one)
    assert len(records(file)) == 2


FOREIGN = [
    b'{"important": "settings"}',
    b'{"important": "settings"}\n',
    b"{",
    b"\0\0\0",
    b"body { color: red }\n",
    b'{"path":"/usr/bin"}',
    b'{"path":"/usr/bin"}\n',
    b"[1]\n",
    b"\0asm\1\0",
]


def test_a_file_of_somebody_elses_is_refused_and_left_alone(bulk, tmp_path):
    file = tmp_path / "o.jsonl"
    for contents in FOREIGN:
        file.write_bytes(contents)
        assert "other things" in bulk("a.jpg", "-o", "o.jsonl", status=1)
        assert file.read_bytes() == contents


@pytest.mark.parametrize("how", ["removed", "replaced", "folder"])
def test_lines_that_go_away_end_the_run_and_are_kept(bulk, photos, tmp_path, how):
    """With a picture that is still to be asked about, and at the end of the run."""
    file = tmp_path / "out/o.jsonl"
    os.mkfifo(tmp_path / "list")
    for listed in ("photos/00002.jpg\n", ""):
        bulk("photos/00000.jpg", "-o", "out/o.jsonl")

        def remove(listed=listed):
            with (tmp_path / "list").open("w") as paths:  # it is read when the lines are open
                file.unlink()
                if how == "replaced":
                    file.write_text("new")
                if how == "folder":
                    file.parent.rmdir()
                paths.write(listed)

        with meanwhile(remove):
            said = bulk("--from-file", "list", "-o", "out/o.jsonl", status=1)
        assert "removed or replaced" in said
        rescued = Path(said.strip().rsplit(" in ")[-1])
        assert [each["path"] for each in records(rescued)] == ["photos/00000.jpg"]
        rescued.unlink()
        file.unlink(missing_ok=True)


EDITED = [
    {"caption": 5},
    {"caption": None, "error": "text"},
    {"error": {"message": 5}},
    {"objects": "none"},
    {"objects": [{"x_min": "a"}, 5, {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]},
    {"points": {"x": 1}},
    {"points": [{"x": 10**400, "y": 0}]},
    {"file": {"size": "big"}},
    {"file": {"size": 10**30, "mtime_ns": 1, "sha256": "x"}},
    {"metrics": [1]},
    {"metrics": {"input_tokens": "many", "output_tokens": 1e300}},
    {"tries": "often", "seconds": []},
    {"time": "late"},
    {"time": 10**400},
    {"request_id": 7, "finish_reason": {}},
    {"caption": "half a pair \ud83d"},
    {"deep": json.loads("[" * 90 + "]" * 90)},
]
DETECTED = {"skill": "detect", "object": "red"}
FORMS = {
    "o.csv": ASKED,
    "o.jsonl.gz": ASKED,
    "o.parquet": ASKED,
    "o.tar": ASKED,
    "o.srt": ASKED,
    "o.coco.json": DETECTED,
}


@pytest.mark.parametrize("output", FORMS)
def test_edited_lines_crash_neither_report_nor_tables(bulk, tmp_path, output):
    for extra in ("pyarrow", "webdataset", "av"):
        pytest.importorskip(extra)
    base = {"path": "a.jpg", **FORMS[output], "caption": "a", "file": None}
    lines = [base | {"path": f"{number}.jpg"} | each for number, each in enumerate(EDITED)]
    (tmp_path / f"{output}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    asked = ("--skill", "detect", "--object", "red") if FORMS[output] is DETECTED else ()
    bulk("gone.mp4", "-o", output, *asked, "--report", "report.html", status=1)
    assert (tmp_path / output).exists()
    assert Page(tmp_path / "report.html").tags["figure"] == len(EDITED)


# -- texts -------------------------------------------------------------------------


def test_a_folder_of_texts_has_one_beside_each_pictures_name(bulk, photos, tmp_path):
    texts = tmp_path / "captions"
    bulk("photos", "-o", "captions/")
    assert {path.relative_to(texts) for path in texts.rglob("*.txt")} == {
        path.relative_to(photos).with_suffix(".txt") for path in photos.rglob("*.jpg")
    }
    assert "picture" in (texts / "below/00001.txt").read_text()
    (texts / "00002.txt").unlink()
    assert "1 answered, 0 failed, 19 done before" in bulk("photos", "-o", "captions/")


def test_texts_that_people_wrote_or_changed_stay_and_are_named(bulk, photos, tmp_path):
    (photos / "00000.txt").write_text("by hand\n")
    said = bulk("photos", "-o", "photos/")
    assert "19 answered" in said
    assert "1 texts" in said
    assert "photos/00000.txt" in said
    (photos / "00002.txt").write_text("corrected\n")
    for number in (2, 4):
        (photos / f"{number:05}.jpg").write_bytes(picture(40 + number))
    (photos / "00006.txt").unlink()
    (photos / "00006.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("by hand")
    said = bulk("photos", "-o", "photos/")
    assert "1 answered" in said
    assert "3 texts" in said
    assert (photos / "00000.txt").read_text() == "by hand\n"
    assert (photos / "00002.txt").read_text() == "corrected\n"
    assert (tmp_path / "elsewhere").read_text() == "by hand"
    bulk("photos", "-o", "photos/", "--overwrite")
    assert "picture" in (photos / "00000.txt").read_text()
    assert "picture" in (photos / "00002.txt").read_text()


def test_a_text_that_cannot_be_is_its_own_pictures_failure(bulk, tmp_path):
    photos, texts = make_pictures(tmp_path / "photos", 1), tmp_path / "texts"
    for name in ("same.jpg", "same.png", "x" * 251 + ".jpg", "y" * 255):  # .txt is too long
        (photos / name).write_bytes(picture())
    (texts / "00000.txt").mkdir(parents=True)
    for _ in range(2):
        said = bulk("photos", photos / ("y" * 255), "-o", "texts/", status=1)
        assert "3 failed" in said
    assert (texts / ("x" * 251 + ".txt")).exists()
    errors = {
        Path(each["path"]).stem: each["error"]["message"]
        for each in records(texts / ".moondream.jsonl")
        if "error" in each
    }
    assert "File name too long" in errors["y" * 255]
    assert "Is a directory" in errors["00000"]
    assert "the text of another picture" in errors["same"]


def test_no_text_is_written_outside_its_folder(bulk, tmp_path):
    inner = tmp_path / "inner"
    for place in (tmp_path, inner):
        make_pictures(place, 1)
    below = ["../00000.jpg", str(tmp_path / "00000.jpg"), "a/../../00000.jpg", ".."]
    (inner / "in.csv").write_text("\n".join(["path", *below, ""]))
    bulk("inner/in.csv", "-o", "inner/texts/", status=1)
    found = [path.relative_to(inner / "texts") for path in tmp_path.rglob("*.txt")]
    assert found == [(tmp_path / "00000.txt").relative_to("/")]


# -- outputs that are somebody else's, or go wrong -----------------------------------


def test_links_beside_the_outputs_lead_to_no_other_file(bulk, photos, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("o.jsonl.new", "o.csv.new", "report.html.new"):
        (tmp_path / name).symlink_to("mine")
    (photos / "broken.jpg").write_bytes(b"")
    for _ in range(2):
        for output in (("o.csv", "--report", "report.html"), ("o.jsonl",)):
            bulk("photos", "-o", *output, status=1)
    assert (tmp_path / "mine").read_text() == "mine"


LEFT_OUT = {
    "": ([], []),
    "o.csv": (["a.pdf"], ["1 other file was left out: 1 .pdf"]),
    "o.jsonl": (["a.pdf", "b.pdf"], ["2 other files were left out: 2 .pdf"]),
}


@pytest.mark.parametrize("output", LEFT_OUT)
def test_what_a_run_writes_is_not_left_out_of_it(bulk, photos, output):
    names, expected = LEFT_OUT[output]
    for name in names:
        (photos / name).write_bytes(b"x")
    for _ in range(2):  # the second run finds the files of the first
        said = bulk("photos", "-o", f"photos/{output}", "--report", "photos/page.html")
        assert [line for line in said.splitlines() if "other file" in line] == expected


def test_lines_go_to_stdout(command, photos, tmp_path):
    _, output, _ = command("bulk", "photos", "-o", "-")
    assert len([json.loads(line)["caption"] for line in output.splitlines()]) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    ("stdout", "ends"),
    [
        ("> /dev/full", (1, "moondream-async: Can't write stdout: No space left on device\n")),
        ("| :", (141, "")),
    ],
)
async def test_lines_that_stdout_does_not_take_end_it(photos, simulator, tmp_path, stdout, ends):
    asked = [*PROGRAM, "bulk", "photos", "-o", "-", "--endpoint", simulator.endpoint]
    shell = f"set -o pipefail; {shlex.join(asked)} {stdout}"
    done = await anyio.run_process(["bash", "-c", shell], check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr.decode()) == ends


@contextlib.contextmanager
def small_disk(size):
    """A limit for files takes a part of the last write, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_ends_it_with_whole_lines_and_a_reason(bulk, photos, tmp_path):
    with small_disk(5000):
        said = bulk("photos", "-o", "o.jsonl", status=1)
    assert "Can't write o.jsonl: File too large" in said
    before = records(tmp_path / "o.jsonl")
    assert 0 < len(before) < 20
    assert f"{len(before)} done before" in bulk("photos", "-o", "o.jsonl")
    assert len({each["path"] for each in records(tmp_path / "o.jsonl")}) == 20


def test_a_page_is_replaced_only_when_the_new_one_is_whole(bulk, photos, tmp_path):
    report = ("-o", "o.jsonl", "--report", "r.html")
    bulk("photos/00000.jpg", *report)
    before = (tmp_path / "r.html").read_bytes()
    with small_disk(len(before)):
        assert "Can't write r.html: File too large" in bulk("photos/00002.jpg", *report, status=1)
    assert (tmp_path / "r.html").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "o.jsonl", "r.html"}


@pytest.mark.parametrize(
    ("call", "errno", "told"),
    [
        ("fsync", "EINVAL", "file system"),
        ("fsync", "EIO", "Can't write o.jsonl"),
        ("flock", "ENOTSUP", "file system"),
        ("scandir", "EIO", "Can't list photos: Input/output error"),
        ("readdir", "EIO", "Can't list photos: Input/output error"),
    ],
)
def test_a_disk_that_fails_ends_no_more_than_it_must(
    bulk, photos, tmp_path, monkeypatch, *, call, errno, told
):
    make_pictures(tmp_path / "photos2", 4)
    failure = OSError(getattr(errnos, errno), os.strerror(getattr(errnos, errno)))
    scandir = os.scandir

    def fail(*_):
        raise failure

    @contextlib.contextmanager
    def entries(folder):
        with scandir(folder) as found:
            yield itertools.chain([next(found)], map(fail, found))

    failing = {
        "fsync": ("os.fsync", fail),
        "flock": ("fcntl.flock", fail),
        "scandir": ("os.scandir", lambda at: fail() if str(at) == "photos" else scandir(at)),
        "readdir": ("os.scandir", lambda at: entries(at) if str(at) == "photos" else scandir(at)),
    }
    listed = call in ("scandir", "readdir")
    with monkeypatch.context() as patch:
        patch.setattr(*failing[call])
        said = bulk("photos", "photos2", "-o", "o.jsonl", status=listed or "Can't write" in told)
    assert said.count(told) == 1
    assert len(records(tmp_path / "o.jsonl")) >= 4


# -- tables, boxes and the report ------------------------------------------------------


def test_parquet_has_a_row_for_each_picture(bulk, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    (photos / "broken.jpg").write_bytes(b"no picture")
    arguments = ("photos", "-o", "out.parquet", "--skill", "detect", "--object", "red")
    bulk(*arguments, status=1)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(rows) == 21
    (failed,) = [row for row in rows if row["error"]]
    assert failed["error_type"] == "ImageError"
    assert all(row["objects"] is not None and row["input_tokens"] for row in rows if row != failed)
    (photos / "broken.jpg").unlink()
    make_pictures(photos, 21)
    bulk(*arguments)
    assert len(parquet.read_table(tmp_path / "out.parquet")) == 22  # the failed one is still told


@pytest.mark.parametrize("output", ["o.jsonl", "o.csv", "o.parquet", "texts/"])
def test_half_a_surrogate_pair_loses_no_answer(bulk, photos, tmp_path, output):
    async def play(peer):
        while True:
            await peer.request()
            await peer.send(whole(b'{"caption": "a \\ud83d cat"}'))

    with serving(play) as server:
        bulk("photos/00000.jpg", "-o", output, MOONDREAM_ENDPOINT=server.endpoint)
    assert [text for _, text in rows_of(tmp_path / output)] == ["a \ufffd cat"]


def test_boxes_are_coco_and_yolo_as_others_read_them(bulk, tmp_path, capsys):
    supervision = pytest.importorskip("supervision")
    coco = pytest.importorskip("pycocotools.coco")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        red = Image.new("RGB", (40, 80), "white")
        red.paste("red", (10, 10, 30, 30))
        red.save(photos / f"red{number}.png")
    asked = ("photos", "--skill", "detect", "--object", "red")
    bulk(*asked, "-o", "boxes.coco.json")
    (box,) = records(tmp_path / "boxes.coco.json.jsonl")[0]["objects"]
    left, right = box["x_min"] * 40, box["x_max"] * 40
    top, bottom = box["y_min"] * 80, box["y_max"] * 80
    read = coco.COCO(str(tmp_path / "boxes.coco.json"))
    assert len(read.getImgIds()) == len(read.getAnnIds()) == 3
    expected = [left, top, right - left, bottom - top]
    assert read.anns[1]["bbox"] == pytest.approx(expected, abs=0.01)
    capsys.readouterr()  # what the library prints
    bulk(*asked, "-o", "yolo/")
    data = supervision.DetectionDataset.from_yolo(
        str(photos), str(tmp_path / "yolo/labels"), str(tmp_path / "yolo/data.yaml")
    )
    assert data.classes == ["red"]
    for _, _, detections in data:
        assert detections.xyxy[0] == pytest.approx([left, top, right, bottom], abs=0.01)
    assert "3 done before" in bulk(*asked, "-o", "yolo/")


def test_the_report_shows_pictures_boxes_and_errors_and_loads_nothing(bulk, photos, tmp_path):
    (photos / "<b>.jpg").write_bytes(b"no picture")
    red = Image.new("RGB", (40, 40), "white")
    red.paste("red", (10, 10, 30, 30))
    red.save(photos / "red.png")
    asked = ("--skill", "detect", "--object", "red")
    bulk("photos", "-o", "o.jsonl", "--report", "report.html", *asked, status=1)
    boxes = sum(len(line.get("objects", ())) for line in records(tmp_path / "o.jsonl"))
    page = Page(tmp_path / "report.html")
    assert page.tags["figure"] == 22
    assert page.tags["img"] == 21
    assert page.tags["rect"] == boxes >= 1
    assert page.tags["b"] == 0
    assert "ImageError: 'photos/<b>.jpg' is not a picture" in page.text
    assert all(address.startswith("data:image/") for address in page.loaded)


def test_the_report_opens_only_what_was_asked_about(bulk, photos, tmp_path):
    """An EPS file would start Ghostscript, a pipe would wait for ever."""
    (photos / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (13_300, 13_300)).save(photos / "bomb.png")
    os.mkfifo(photos / "pipe.jpg")
    (tmp_path / "private.jpg").write_bytes(picture())
    line = {"path": str(tmp_path / "private.jpg"), **ASKED, "caption": "x"}
    (tmp_path / "o.jsonl").write_text(json.dumps(line) + "\n")
    bulk("photos", "-o", "o.jsonl", "--report", "r.html", status=1)
    page = Page(tmp_path / "r.html")
    assert page.tags["figure"] == 24
    assert page.tags["img"] == 20


# -- by batch -----------------------------------------------------------------------------


def test_pictures_of_a_batch_that_came_to_nothing_are_asked_about_again(bulk, photos, tmp_path):
    arguments = ("photos", "-o", "o.jsonl", "--via", "batch-api")
    names = ("photos/00000.jpg", "photos/00002.jpg")
    pictures = [[{"path": each, "below": "x.jpg"}, None] for each in names]
    record = [{"batch": "nobody-knows", "pictures": pictures}]
    (tmp_path / "o.jsonl.batches").write_text(json.dumps(record))
    assert "2 failed" in bulk(*arguments, status=1)
    assert "2 answered, 0 failed, 18 done before" in bulk(*arguments)


BATCH = {
    "id": "b1",
    "model": "moondream3-preview",
    "progress": {"total": 9, "completed": 0, "failed": 9},
    "created_at": "2026-11-01T00:00:00Z",
}
ANSWER = {"status": "ok", "result": {"caption": "A heron."}, "usage": {"output_tokens": 3}}
PLACES = [  # how a result says whose it is: by its id in any form, or by its place
    {"id": 0, "line_index": 8},
    {"id": "1", "line_index": 7},
    {"id": 2.0},
    {"line_index": 3},
    {"id": None, "line_index": 4},
    {"id": [3], "line_index": 5},
]
NOBODYS = [{"id": "x"}, {}, {"id": True}]


def contents(path):
    data, mtime = path.read_bytes(), path.stat().st_mtime_ns
    return {"size": len(data), "mtime_ns": mtime, "sha256": hashlib.sha256(data).hexdigest()}


def batch_server(end):
    """Says that a batch has ended, and has two files of results, one of them with noise."""
    lines = [json.dumps(each | ANSWER).encode() for each in PLACES + NOBODYS]
    files = [[b"<html>", b"\xff\xfe", b"[]", *lines[:3]], lines[3:]]

    async def state(request):
        outputs = [{"index": n, "url": str(request.url.with_path(f"/file/{n}"))} for n in (0, 1)]
        return web.json_response(BATCH | {"outputs": outputs} | end)

    async def file(request):
        return web.Response(body=b"\n".join(files[int(request.match_info["number"])]))

    return serving_pages(web.get("/v1/batch/b1", state), web.get("/file/{number}", file))


@pytest.mark.parametrize(
    ("end", "kept", "said"),
    [
        ({"status": "completed"}, 6, "6 answered, 1 failed"),
        ({"status": "failed", "error": {"code": "x", "message": "Out of luck"}}, 0, "Out of luck"),
    ],
    ids=["files with noise", "failed"],
)
def test_what_a_batch_lost_is_failed_and_what_it_has_is_kept(bulk, tmp_path, end, kept, said):
    paths = sorted(make_pictures(tmp_path / "photos", 7).rglob("*.jpg"), key=lambda each: each.name)
    pictures = [
        [{"path": str(path.relative_to(tmp_path)), "below": "x.jpg"}, contents(path)]
        for path in paths
    ]
    record = json.dumps([{"batch": "b1", "pictures": pictures}])
    (tmp_path / "o.jsonl.batches").write_text(record)
    arguments = ("photos", "-o", "o.jsonl", "--via", "batch-api")
    with batch_server(end) as origin:
        assert said in bulk(*arguments, MOONDREAM_ENDPOINT=f"{origin}/v1", status=1)
    answered = [each for each in records(tmp_path / "o.jsonl") if "caption" in each]
    assert {each["path"] for each in answered} == {each[0]["path"] for each in pictures[:kept]}
    assert {each["caption"] for each in answered} <= {"A heron."}
    assert not (tmp_path / "o.jsonl.batches").exists()  # it is not waited for again
