"""What ``bulk`` writes and goes on from: nothing lost, nothing twice, nothing overwritten."""

import contextlib
import errno as errnos
import hashlib
import itertools
import json
import os
import shlex
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from bulk_runs import ASKED, Page, make_pictures, records, rows_of
from PIL import Image
from programs import PROGRAM
from raw_server import RawServer, whole

from moondream_async.batch.wire import read_batch_result
from moondream_async.cli import main
from moondream_async.cli.bulk.by_batch import _place as place_of
from moondream_async.cli.bulk.journal import Journal
from moondream_async.cli.bulk.lists import PathList
from moondream_async.cli.bulk.names import name_of, path_of, simplest
from moondream_async.cli.bulk.sources import Contents, Found
from moondream_async.errors import MoondreamError, RequestError
from moondream_async.results import CaptionResult

pytestmark = pytest.mark.slow  # most tests run the program several times

CONTENTS = Contents(1, 1, "x")
FOUND = Found("a.jpg", "a.jpg")
OTHER = Found("b.jpg", "b.jpg")


def lines(*texts, newline="\n"):
    return newline.join(texts) + newline


# -- nothing twice -----------------------------------------------------------------


@pytest.mark.parametrize("output", ["o.csv", "o.jsonl.gz"])
async def test_failures_that_were_mended_leave_no_row_in_any_form(bulk, photos, tmp_path, output):
    good = (photos / "00000.jpg").read_bytes()
    arguments = ("photos", "-o", output, "--report", "report.html")
    for content, status in ((b"no picture", 1), (good, 0)):
        for broken in ("00000.jpg", "00002.jpg"):
            (photos / broken).write_bytes(content)
        await bulk(*arguments, status=status)
        said = f"{20 - 2 * status} answered, {2 * status} failed."
        assert said in Page(tmp_path / "report.html").text
    rows = rows_of(tmp_path / output)
    assert len(records(tmp_path / f"{output}.jsonl")) == len(rows) == 20
    assert all(caption for _, caption in rows)


def test_a_compacted_journal_is_read_written_and_locked_in_its_new_place(tmp_path):
    path = str(tmp_path / "j.jsonl")
    with Journal(path, ASKED) as journal:
        for compact in (lambda: None, journal.compact):
            journal.append(FOUND, CONTENTS, RequestError("no"))
            journal.append(FOUND, CONTENTS, CaptionResult(caption="a"))
            compact()
            with pytest.raises(RequestError, match="Another run"):
                Journal(path, ASKED)
        journal.append(OTHER, CONTENTS, CaptionResult(caption="b"))
        assert [each["caption"] for each in journal.records()] == ["a", "b"]
    assert [each["caption"] for each in records(tmp_path / "j.jsonl")] == ["a", "b"]


def test_a_last_line_without_its_line_break_is_as_good_as_any(tmp_path):
    file = tmp_path / "j.jsonl"
    with Journal(str(file), ASKED) as journal:
        journal.append(FOUND, CONTENTS, CaptionResult(caption="a"))
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    with Journal(str(file), ASKED) as journal:
        assert [each["caption"] for each in journal.records()] == ["a"]
        journal.append(OTHER, CONTENTS, CaptionResult(caption="b"))
    assert len(records(file)) == 2


# -- lists of paths ----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        lines("a.jpg", "é b.jpg").encode(),
        lines("a.jpg", "", "é b.jpg", newline="\r\n").encode(),
        lines("a.jpg", "é b.jpg").encode("utf-8-sig"),
        lines("a.jpg", "é b.jpg", newline="\r\n").encode("utf-16"),
        b"\xfe\xff" + lines("a.jpg", "é b.jpg").encode("utf-16-be"),
        "a.jpg\0é b.jpg\0".encode(),
        "a.jpg\0é b.jpg".encode(),
        "a.jpg\né b.jpg".encode(),
    ],
    ids=["plain", "crlf", "bom", "utf-16", "utf-16-be", "nul", "nul, no end", "no end"],
)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_list_is_read_as_people_and_programs_write_it(data, size):
    paths, got = PathList(), []
    for start in range(0, len(data), size):
        got += paths.feed(data[start : start + size])
    assert got + paths.close() == ["a.jpg", "é b.jpg"]


def test_a_list_that_is_none_is_refused_before_it_fills_the_memory():
    paths = PathList()
    with pytest.raises(RequestError, match="line of the list"):
        any(paths.feed(b"x" * 65536) for _ in range(100))


# -- names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "a.jpg",
        "é.jpg",
        os.fsdecode(b"\xff"),
        r"\xff",
        r"\\xff",
        r"a\b",
        os.fsdecode(b"\\\xff\\xff"),
    ],
)
def test_a_name_leads_back_to_its_path_and_to_no_other(path):
    assert path_of(name_of(path)) == path
    name_of(path).encode()


def test_a_byte_and_its_escape_are_two_names():
    assert name_of(os.fsdecode(b"\xff")) != name_of(r"\xff")


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("a/./b//c.jpg", "a/b/c.jpg"),
        ("./a.jpg", "a.jpg"),
        ("a/../b.jpg", "b.jpg"),
        ("../b.jpg", "../b.jpg"),
        ("../../a/../b.jpg", "../../b.jpg"),
        ("link/../x.jpg", "link/../x.jpg"),
        ("/../a.jpg", "/../a.jpg"),
    ],
)
def test_a_path_is_made_simple_without_leading_elsewhere(tmp_path, monkeypatch, path, means):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    assert simplest(path) == means


async def test_odd_names_are_asked_about_once_by_either_way(bulk, photos, tmp_path):
    good = (photos / "00000.jpg").read_bytes()
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in (b"\xff.jpg", rb"\xff.jpg", b"line\nbreak.jpg"):
        (odd / os.fsdecode(name)).write_bytes(good)
    for via in ("requests", "batch-api"):
        await bulk("odd", "-o", f"{via}.jsonl", "--via", via)
        assert len({each["path"] for each in records(tmp_path / f"{via}.jsonl")}) == 3
        assert "3 done before" in await bulk("odd", "-o", f"{via}.jsonl", "--via", via)


# -- texts -------------------------------------------------------------------------


async def test_texts_that_people_wrote_or_changed_stay_and_are_named(bulk, photos, tmp_path):
    (photos / "00000.txt").write_text("by hand\n")
    said = await bulk("photos", "-o", "photos/")
    assert "19 answered" in said
    assert "1 texts" in said
    assert "photos/00000.txt" in said
    (photos / "00002.txt").write_text("corrected\n")
    Image.new("RGB", (90, 9)).save(photos / "00002.jpg")
    Image.new("RGB", (91, 9)).save(photos / "00004.jpg")
    (photos / "00006.txt").unlink()
    (photos / "00006.txt").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("by hand")
    said = await bulk("photos", "-o", "photos/")
    assert "1 answered" in said
    assert "3 texts" in said
    assert (photos / "00000.txt").read_text() == "by hand\n"
    assert (photos / "00002.txt").read_text() == "corrected\n"
    assert (tmp_path / "elsewhere").read_text() == "by hand"
    said = await bulk("photos", "-o", "photos/", "--overwrite")
    assert "picture" in (photos / "00000.txt").read_text()
    assert "picture" in (photos / "00002.txt").read_text()


async def test_a_text_that_cannot_be_is_its_own_pictures_failure(bulk, photos, tmp_path):
    good = (photos / "00000.jpg").read_bytes()
    (photos / ("x" * 251 + ".jpg")).write_bytes(good)
    (photos / ("y" * 255)).write_bytes(good)  # .txt makes it too long
    (tmp_path / "texts/00000.txt").mkdir(parents=True)
    for _ in range(2):
        said = await bulk("photos", photos / ("y" * 255), "-o", "texts/", status=1)
        assert "2 failed" in said
    assert (tmp_path / "texts" / ("x" * 251 + ".txt")).exists()
    errors = {
        each["path"]: each["error"]["message"]
        for each in records(tmp_path / "texts/.moondream.jsonl")
        if "error" in each
    }
    assert "File name too long" in errors[str(photos / ("y" * 255))]
    assert "Is a directory" in errors["photos/00000.jpg"]


@pytest.mark.parametrize("below", ["../../x.jpg", "/x.jpg", "a/../../x.jpg", ".."])
def test_no_text_is_written_outside_its_folder(tmp_path, below):
    from moondream_async.cli.bulk.texts import TextFolder

    folder = tmp_path / "texts"
    texts = TextFolder(str(folder))
    with (
        Journal(str(tmp_path / "j.jsonl"), ASKED, with_texts=True) as journal,
        contextlib.suppress(RequestError),
    ):
        texts.write(Found("x.jpg", below), "a text", journal)
    assert [path for path in tmp_path.rglob("*.txt") if folder not in path.parents] == []


# -- outputs that are somebody else's ------------------------------------------------


@pytest.mark.parametrize(
    "contents",
    [
        b'{"important": "settings"}',
        b'{"important": "settings"}\n',
        b"{",
        b"\0\0\0",
        b"body { color: red }\n",
        b'{"path":"/usr/bin"}',
        b'{"path":"/usr/bin"}\n',
        b"[1]\n",
        b"\0asm\1\0",
    ],
)
def test_a_file_of_somebody_elses_is_refused_and_left_alone(tmp_path, contents):
    file = tmp_path / "j.jsonl"
    file.write_bytes(contents)
    with pytest.raises(RequestError, match="other things"):
        Journal(str(file), ASKED)
    assert file.read_bytes() == contents


TORN = b'{"path":"b.jpg","skill":"caption","length":"normal","caption":"b"}'


@pytest.mark.parametrize(
    "tail", [b"", b"\0" * 40, TORN[:1], TORN[:12], TORN[:10] + b"\0\0", TORN[:-1]]
)
def test_what_a_lost_run_left_behind_its_lines_is_mended(tmp_path, tail):
    file = tmp_path / "j.jsonl"
    with Journal(str(file), ASKED) as journal:
        journal.append(FOUND, CONTENTS, CaptionResult(caption="a"))
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    with Journal(str(file), ASKED) as journal:
        assert file.read_bytes() == whole
        assert journal.has(FOUND)
        assert not journal.has(OTHER)


async def test_links_beside_the_outputs_lead_to_no_other_file(bulk, photos, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in ("o.jsonl.new", "o.csv.new", "report.html.new"):
        (tmp_path / name).symlink_to("mine")
    (photos / "broken.jpg").write_bytes(b"")
    for _ in range(2):
        for output in (("o.csv", "--report", "report.html"), ("o.jsonl",)):
            await bulk("photos", "-o", *output, status=1)
    assert (tmp_path / "mine").read_text() == "mine"


async def test_lines_go_to_stdout(cli, photos, tmp_path):
    _, output, _ = await cli("bulk", "photos", "-o", "-", cwd=tmp_path)
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


# -- outputs that go wrong ------------------------------------------------------------


@pytest.mark.parametrize("how", ["removed", "replaced", "folder"])
def test_a_journal_that_goes_away_ends_the_run_and_its_lines_are_kept(tmp_path, how):
    folder = tmp_path / "out"
    folder.mkdir()
    file = folder / "j.jsonl"
    with Journal(str(file), ASKED) as journal:
        journal.append(FOUND, CONTENTS, CaptionResult(caption="a"))
        file.unlink()
        if how == "replaced":
            file.write_text("new")
        if how == "folder":
            folder.rmdir()
        for act in (
            lambda: journal.append(FOUND, CONTENTS, CaptionResult(caption="b")),
            journal.compact,
        ):
            with pytest.raises(MoondreamError, match="removed or replaced") as caught:
                act()
            rescued = str(caught.value).rsplit(" in ")[-1]
            assert [each["caption"] for each in records(Path(rescued))] == ["a"]
            Path(rescued).unlink()


@pytest.mark.parametrize(
    ("call", "errno", "goes_on"),
    [
        ("fsync", "EINVAL", True),
        ("fsync", "EIO", False),
        ("flock", "ENOTSUP", True),
        ("flock", "ENOLCK", True),
        ("scandir", "EIO", True),
        ("readdir", "EIO", True),
        ("write", "ENOSPC", False),
        ("write", "EIO", False),
    ],
)
def test_a_disk_that_fails_ends_no_more_than_it_must(
    moondream_simulator, photos, tmp_path, monkeypatch, capsys, *, call, errno, goes_on
):
    """Run within this process, whose calls of the system can be made to fail."""
    make_pictures(tmp_path / "photos2", 4)
    monkeypatch.chdir(tmp_path)
    failure = OSError(getattr(errnos, errno), os.strerror(getattr(errnos, errno)))
    scandir, write = os.scandir, os.write

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
        "write": ("os.write", lambda to, data: fail() if b"caption" in data else write(to, data)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*failing[call])
        status = main(["bulk", "photos", "photos2", "-o", "o.jsonl"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if goes_on:
        assert len(records(tmp_path / "o.jsonl")) >= 4
        assert status == (1 if call in ("scandir", "readdir") else 0), said
        assert "file system" in said or "Can't list photos: Input/output error" in said
        assert said.count("file system") + said.count("Can't list") == 1
    else:
        assert status == 1
        assert "Can't write o.jsonl" in said


# -- lines that somebody has edited ---------------------------------------------------


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
    {"request_id": 7, "finish_reason": {}},
    {"caption": "half a pair \ud83d"},
    {"deep": json.loads("[" * 90 + "]" * 90)},
]


def test_edited_lines_crash_neither_report_nor_tables(tmp_path):
    pytest.importorskip("pyarrow")
    from moondream_async.cli.bulk.exports import WRITERS
    from moondream_async.cli.bulk.report import write_report

    base = {"path": "a.jpg", **ASKED, "caption": "a", "file": None}
    file = tmp_path / "j.jsonl"
    file.write_text(
        "".join(
            json.dumps({**base, "path": f"{number}.jpg", **each}) + "\n"
            for number, each in enumerate(EDITED)
        )
    )
    with Journal(str(file), ASKED) as journal:
        for ending, write in WRITERS.items():
            write(journal.records, str(tmp_path / f"o.{ending}"))
        write_report(journal.records, str(tmp_path / "report.html"))
    assert Page(tmp_path / "report.html").tags["figure"] == len(EDITED)


@pytest.mark.parametrize("output", ["o.jsonl", "o.csv", "o.parquet", "texts/"])
async def test_half_a_surrogate_pair_loses_no_answer(bulk, photos, tmp_path, output):
    async def play(peer):
        while True:
            await peer.request()
            await peer.send(whole(b'{"caption": "a \\ud83d cat"}'))

    async with RawServer(play) as server:
        await bulk("photos", "-o", output, MOONDREAM_ENDPOINT=server.endpoint)
    assert [text for _, text in rows_of(tmp_path / output)] == ["a \ufffd cat"] * 20


# -- the report ------------------------------------------------------------------------


async def test_the_report_opens_only_what_was_asked_about(bulk, photos, tmp_path):
    """An EPS file would start Ghostscript, a pipe would wait for ever."""
    (photos / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (13_300, 13_300)).save(photos / "bomb.png")
    os.mkfifo(photos / "pipe.jpg")
    Image.new("RGB", (9, 9), "red").save(tmp_path / "private.png")
    (tmp_path / "o.jsonl").write_text(
        json.dumps({"path": str(tmp_path / "private.png"), **ASKED, "caption": "x"}) + "\n"
    )
    with anyio.fail_after(60):
        await bulk("photos", "-o", "o.jsonl", "--report", "r.html", status=1)
    page = Page(tmp_path / "r.html")
    assert page.tags["figure"] == 24
    assert page.tags["img"] == 20


# -- by batch -----------------------------------------------------------------------------


async def test_pictures_of_a_batch_that_came_to_nothing_are_asked_about_again(
    bulk, photos, tmp_path
):
    arguments = ("photos", "-o", "o.jsonl", "--via", "batch-api")
    names = ("photos/00000.jpg", "photos/00002.jpg")
    pictures = [[{"path": each, "below": "x.jpg"}, None] for each in names]
    record = [{"batch": "nobody-knows", "pictures": pictures}]
    (tmp_path / "o.jsonl.batches").write_text(json.dumps(record))
    said = await bulk(*arguments, status=1)
    assert "2 failed" in said
    said = await bulk(*arguments)
    assert "2 answered, 0 failed, 18 done before" in said


BATCH = {
    "id": "b1",
    "model": "moondream3-preview",
    "progress": {"total": 3, "completed": 0, "failed": 3},
    "created_at": "2026-11-01T00:00:00Z",
}
ANSWER = {"status": "ok", "result": {"caption": "A heron."}, "usage": {"output_tokens": 3}}


def contents(path):
    data, mtime = path.read_bytes(), path.stat().st_mtime_ns
    return {"size": len(data), "mtime_ns": mtime, "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("fate", ["failed", "a file of noise"])
async def test_what_a_batch_lost_is_failed_and_what_it_has_is_kept(bulk, tmp_path, fate):
    """A batch that failed, and one of whose files of results some lines are no JSON."""

    async def state(request):
        outputs = [{"index": n, "url": str(request.url.with_path(f"/file/{n}"))} for n in (0, 1)]
        end = (
            {"status": "failed", "error": {"code": "x", "message": "Out of luck"}}
            if fate == "failed"
            else {"status": "completed", "outputs": outputs}
        )
        return web.json_response(BATCH | end)

    async def file(request):
        number = request.match_info["number"]
        noise = b"<html>\n\xff\xfe\n[]\n" if number == "0" else b""
        return web.Response(body=noise + json.dumps({"id": f"{number}"} | ANSWER).encode())

    app = web.Application()
    app.add_routes([web.get("/v1/batch/b1", state), web.get("/file/{number}", file)])
    make_pictures(tmp_path / "photos", 3)
    names = ("photos/00000.jpg", "photos/below/00001.jpg", "photos/00002.jpg")
    pictures = [[{"path": each, "below": "x.jpg"}, contents(tmp_path / each)] for each in names]
    record = json.dumps([{"batch": "b1", "pictures": pictures}])
    (tmp_path / "o.jsonl.batches").write_text(record)
    arguments = ("photos", "-o", "o.jsonl", "--via", "batch-api")
    async with TestServer(app) as server:
        said = await bulk(*arguments, MOONDREAM_ENDPOINT=str(server.make_url("/v1")), status=1)
    kept = [each["caption"] for each in records(tmp_path / "o.jsonl") if "caption" in each]
    if fate == "failed":
        assert "Out of luck" in said
        assert "3 failed" in said
        assert kept == []
    else:
        assert "2 answered, 1 failed" in said
        assert kept == ["A heron."] * 2
    assert not (tmp_path / "o.jsonl.batches").exists()  # it is not waited for again


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ({"id": 3, "line_index": 0}, 3),
        ({"id": "3", "line_index": 0}, 3),
        ({"id": 3.0}, 3),
        ({"line_index": 3}, 3),
        ({"id": None, "line_index": 3}, 3),
        ({"id": [3], "line_index": 3}, 3),
        ({"id": "x"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_result_of_a_batch_is_found_by_its_id_in_any_form_or_its_place(line, place):
    answer = {"status": "ok", "result": {"caption": "A heron."}}
    result = read_batch_result(json.dumps(line | answer).encode())
    assert place_of(result) == place


@pytest.mark.parametrize(
    ("output", "others", "said_of_them"),
    [
        ("photos/o.csv", [], None),
        ("photos/o.csv", ["a.pdf"], "1 other file was left out: 1 .pdf"),
        ("photos/o.jsonl", ["a.pdf", "b.pdf"], "2 other files were left out: 2 .pdf"),
        ("photos/", [], None),
    ],
    ids=["own", "one", "two", "texts"],
)
async def test_what_a_run_writes_is_not_left_out_of_it(bulk, photos, output, others, said_of_them):
    for name in others:
        (photos / name).write_bytes(b"x")
    for _ in range(2):  # the second run finds the files of the first
        said = await bulk("photos", "-o", output, "--report", "photos/page.html")
        assert [line for line in said.splitlines() if "other file" in line] == [
            line for line in [said_of_them] if line
        ]
