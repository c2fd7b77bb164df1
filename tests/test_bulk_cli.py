"""The command ``bulk``: the real program, over real sockets, and whatever may end it."""

import os
import signal
import subprocess
import tarfile

import anyio
import anyio.to_thread
import pytest
from bulk_runs import Page, make_pictures, paths_of, records, rows_of
from PIL import Image

from moondream_async.cli import main
from moondream_async.cli.bulk.sources import Found, PictureFile
from moondream_async.simulator import Simulator

pytestmark = pytest.mark.slow  # each test runs the program several times


# -- what comes out -----------------------------------------------------------------


async def test_a_folder_gives_a_line_for_each_picture(bulk, photos, tmp_path):
    said = await bulk("photos", "-o", "out.jsonl")
    assert "20 answered, 0 failed" in said
    assert " tokens, 0:" in said
    assert "$" not in said  # only the cloud asks for money
    lines = records(tmp_path / "out.jsonl")
    assert paths_of(lines) == sorted(
        str(path.relative_to(tmp_path)) for path in photos.rglob("*.jpg")
    )
    assert all(line["caption"] and line["file"]["sha256"] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--skill", "query", "--question", "How wide is it?"], "answer"),
        (["--skill", "detect", "--object", "red"], "objects"),
        (["--skill", "point", "--object", "red"], "points"),
        (["--skill", "segment", "--object", "red"], "outline"),
        (["--length", "short", "--max-tokens", "4"], "caption"),
    ],
    ids=["query", "detect", "point", "segment", "caption"],
)
async def test_every_skill_can_be_asked(bulk, photos, tmp_path, arguments, key):
    await bulk("photos", "-o", "out.jsonl", *arguments)
    assert all(key in line for line in records(tmp_path / "out.jsonl"))


WAYS = {
    "stdin": ["-"],
    "/dev/stdin": ["--from-file", "/dev/stdin"],
    "fifo": ["--from-file", "pipe"],
    "list": ["--from-file", "list"],
    "pattern": ["photos/*/*.jpg", "photos/*.jpg"],
    "twice": ["photos/*.jpg", "photos/../photos", "--from-file", "list"],
}


@pytest.mark.parametrize("way", WAYS)
async def test_pictures_are_named_in_several_ways_and_asked_about_once(bulk, photos, tmp_path, way):
    names = sorted(str(path.relative_to(tmp_path)) for path in photos.rglob("*.jpg"))
    lines = "".join(f"{name}\r\n" for name in names)
    (tmp_path / "list").write_text(lines)
    async with anyio.create_task_group() as group:
        if way == "fifo":
            os.mkfifo(tmp_path / "pipe")
            group.start_soon(anyio.to_thread.run_sync, (tmp_path / "pipe").write_text, lines)
        stdin = lines.encode() if "stdin" in way else b""
        await bulk(*WAYS[way], "-o", "out.jsonl", stdin=stdin)
    assert paths_of(records(tmp_path / "out.jsonl")) == names


async def test_parquet_has_a_row_for_each_picture(bulk, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra parquet is not installed")
    (photos / "broken.jpg").write_bytes(b"no picture")
    arguments = ("photos", "-o", "out.parquet", "--skill", "detect", "--object", "red")
    await bulk(*arguments, status=1)
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert len(rows) == 21
    (failed,) = [row for row in rows if row["error"]]
    assert failed["error_type"] == "ImageError"
    assert all(row["objects"] is not None and row["input_tokens"] for row in rows if row != failed)
    (photos / "broken.jpg").unlink()
    make_pictures(photos, 21)
    await bulk(*arguments)
    assert len(parquet.read_table(tmp_path / "out.parquet")) == 22  # the failed one is still told


async def test_a_folder_of_texts_has_one_beside_each_pictures_name(bulk, photos, tmp_path):
    await bulk("photos", "-o", "captions/")
    texts = {
        str(path.relative_to(tmp_path / "captions"))
        for path in (tmp_path / "captions").rglob("*.txt")
    }
    assert texts == {
        str(path.relative_to(photos).with_suffix(".txt")) for path in photos.rglob("*.jpg")
    }
    assert "picture" in (tmp_path / "captions/below/00001.txt").read_text()
    (tmp_path / "captions/00002.txt").unlink()
    said = await bulk("photos", "-o", "captions/")
    assert "1 answered, 0 failed, 19 done before" in said


async def test_two_pictures_never_share_a_text(bulk, photos, tmp_path):
    Image.new("RGB", (9, 9)).save(photos / "00000.png")
    await bulk("photos", "-o", "captions/", status=1)
    (failed,) = [
        line for line in records(tmp_path / "captions/.moondream.jsonl") if "error" in line
    ]
    assert "the text of another picture" in failed["error"]["message"]


async def test_a_job_by_batch_gives_the_same_answers_at_half_the_price(bulk, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no picture")
    await bulk("photos", "-o", "one.jsonl", status=1)
    said = await bulk("photos", "-o", "two.jsonl", "--via", "batch-api", status=1)
    one, two = (
        {line["path"]: line.get("caption") for line in records(tmp_path / name)}
        for name in ("one.jsonl", "two.jsonl")
    )
    assert one == two
    assert not (tmp_path / "two.jsonl.batches").exists()
    said = await bulk("photos", "-o", "two.jsonl", "--via", "batch-api", status=1)
    assert "0 answered, 1 failed, 20 done before" in said


async def test_a_batch_that_was_left_is_fetched_and_not_paid_for_again(
    simulator, bulk, started, photos, tmp_path
):
    arguments = ("photos", "-o", "out.jsonl", "--via", "batch-api")
    async with started(*arguments) as program:
        await program.until("has 20 pictures")
        program.interrupt()
        assert (await program.end())[0] == 130
    assert (tmp_path / "out.jsonl.batches").exists()
    said = await bulk(*arguments)
    assert "20 answered" in said
    assert len(records(tmp_path / "out.jsonl")) == 20
    created = [each for each in simulator.requests if each.query.get("action") == "mpu-create"]
    assert len(created) == 1


async def test_the_report_shows_pictures_boxes_and_errors_and_loads_nothing(bulk, photos, tmp_path):
    (photos / "<b>.jpg").write_bytes(b"no picture")
    red = Image.new("RGB", (40, 40), "white")
    red.paste("red", (10, 10, 30, 30))
    red.save(photos / "red.png")
    await bulk(
        *("photos", "-o", "out.jsonl", "--report", "report.html"),
        *("--skill", "detect", "--object", "red"),
        status=1,
    )
    boxes = sum(len(line.get("objects", ())) for line in records(tmp_path / "out.jsonl"))
    page = Page(tmp_path / "report.html")
    assert page.tags["figure"] == 22
    assert page.tags["img"] == 21
    assert page.tags["rect"] == boxes >= 1
    assert page.tags["b"] == 0
    assert "ImageError: 'photos/<b>.jpg' is not a picture" in page.text
    assert all(address.startswith("data:image/") for address in page.loaded)


# -- what fails ---------------------------------------------------------------------


async def test_a_picture_that_fails_is_a_line_and_is_tried_again(bulk, photos, tmp_path):
    good = (photos / "00000.jpg").read_bytes()
    (photos / "00000.jpg").write_bytes(good[:20])
    (photos / "empty.png").write_bytes(b"")
    said = await bulk("photos", "missing.jpg", "-o", "out.jsonl", status=1)
    assert "19 answered, 3 failed" in said
    failed = [line for line in records(tmp_path / "out.jsonl") if "error" in line]
    assert paths_of(failed) == ["missing.jpg", "photos/00000.jpg", "photos/empty.png"]
    assert all(line["error"]["type"] == "ImageError" for line in failed)
    (photos / "00000.jpg").write_bytes(good)
    said = await bulk("photos", "missing.jpg", "-o", "out.jsonl", status=1)
    assert "1 answered, 2 failed, 19 done before" in said
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == len(set(paths_of(lines))) == 22


async def test_a_server_that_fails_and_refuses_costs_no_picture(simulator, bulk, photos, tmp_path):
    make_pictures(photos, 80)
    # A fifth of all requests fails, a tenth is refused.
    for _ in range(10):
        simulator.faults.extend(["status=500,retry_after=0", "slow_start=0,times=3"])
        simulator.faults.extend(["status=429,retry_after=0", "status=503,retry_after=0"])
        simulator.faults.append("slow_start=0,times=4")
    await bulk("photos", "-o", "out.jsonl", "--retries", 6)
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == 80
    assert any(line["tries"] > 1 for line in lines)


async def test_a_wrong_key_ends_it_with_one_line_and_is_nobodys_error(bulk, photos, tmp_path):
    async with Simulator(api_key="right") as simulator:
        keys = {"MOONDREAM_ENDPOINT": simulator.endpoint, "MOONDREAM_API_KEY": "wrong"}
        said = await bulk("photos", "-o", "out.jsonl", **keys, status=1)
    assert "Invalid API key" in said
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_a_picture_that_is_removed_before_its_turn_is_told(
    simulator, started, photos, tmp_path
):
    simulator.faults.append("slow_start=0.5,times=4")
    async with started("photos", "-o", "out.jsonl", "--concurrency", 1) as program:
        await simulator.wait_until(lambda: len(simulator.requests) == 1)
        for path in photos.rglob("*.jpg"):
            path.unlink()
        assert (await program.end())[0] == 1
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == 20
    assert any("No such file" in line.get("error", {}).get("message", "") for line in lines)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, with room for 16 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_full_disk_ends_it_with_whole_lines_and_a_reason(bulk, photos, small_disk):
    make_pictures(photos, 100)
    said = await bulk("photos", "-o", small_disk / "out.jsonl", status=1)
    assert "No space left on device" in said
    before = records(small_disk / "out.jsonl")
    assert 0 < len(before) < 100
    await anyio.run_process(["mount", "-o", "remount,size=1m", str(small_disk)])
    said = await bulk("photos", "-o", small_disk / "out.jsonl")
    assert f"{len(before)} done before" in said
    assert len(set(paths_of(records(small_disk / "out.jsonl")))) == 100


QUERY = ("--skill", "query")
DETECT = ("--skill", "detect", "--object", "red")
OUT = ("-o", "out.jsonl")
REFUSED = [
    (2, "Missing option", "photos"),
    (2, "Missing argument", *OUT),
    (2, "needs '--question'", "photos", *OUT, *QUERY),
    (2, "gives no text", "photos", "-o", "texts/", "--skill", "point", "--object", "red"),
    (2, "'--rate-limit': 0 is not over 0", "photos", *OUT, "--rate-limit", "0"),
    (2, "must end in", "photos", "-o", "outx"),
    (2, "must end in", "photos", "-o", "mine.json"),
    (2, "must end in", "photos", "-o", "style.css"),
    (1, "other things in it than results", "photos", "-o", "mine.jsonl"),
    (1, "no run has made it", "photos", "-o", "mine.csv"),
    (1, "no run has made it", "photos", "-o", "mine.parquet"),
    (1, "no run has made it", "photos", "-o", "mine.jsonl.gz"),
    (1, "is no report", "photos", *OUT, "--report", "mine.html"),
    (1, "none/*.jpg", "none/*.jpg", *OUT),
    (1, "empty", "empty", *OUT),
    (1, "has no column nope", "in.csv", *OUT, "--column", "nope"),
    (1, "its row has no column", "in.csv", *OUT, *QUERY, "--question", "A {nope}?"),
    (2, "{kind} stands for", "photos", *OUT, *QUERY, "--question", "A {kind}?"),
    (2, "{kind} stands for", "photos/*.jpg", "-o", "o/", *QUERY, "--question", "A {kind}?"),
    (2, "{kind} stands for", "photos", *OUT, "--dry-run", "--ask", "a=A {kind}?"),
    (2, "{a-b} stands for", "photos", *OUT, "--skill", "point", "--object", "{a-b}"),
    (1, "no table gives it a", "--from-file", "a.txt", *OUT, *QUERY, "--question", "A {kind}?"),
    (1, "is damaged", "photos", "-o", "damaged.jsonl", "--via", "batch-api"),
    (2, "'-o .vtt' is for", "clip.mp4", "-o", "out.vtt", *DETECT),
    (2, "'-o .srt' is for", "clip.mp4", "photo.jpg", "-o", "out.srt"),
    (2, "takes no videos", "clip.mp4", *OUT, "--via", "batch-api"),
    (1, "Can't read missing.mp4: No such file", "missing.mp4", *OUT),
    (1, "Can't read clip.mp4: ", "clip.mp4", *OUT),
]


@pytest.mark.parametrize(
    ("status", "reason", "arguments"),
    [(status, reason, arguments) for status, reason, *arguments in REFUSED],
    ids=[" ".join(arguments) for _, _, *arguments in REFUSED],
)
def test_what_cannot_be_is_told_and_nobodys_file_is_touched(
    photos, tmp_path, monkeypatch, capsys, *, nobody, status, reason, arguments
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "in.csv").write_text("path\nphotos/00000.jpg\n")
    (tmp_path / "a.txt").write_text("photos/00000.jpg\n")
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    (tmp_path / "damaged.jsonl.batches").write_text('[{"batch": 5')
    for ending in ("json", "jsonl", "jsonl.gz", "csv", "parquet", "html"):
        (tmp_path / f"mine.{ending}").write_text("dear diary\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONDREAM_ENDPOINT", nobody)
    assert main(["bulk", *arguments]) == status
    said = capsys.readouterr().err
    assert reason in said
    assert "Traceback" not in said
    assert status == 1 or said.count("\n") == 1
    assert {path.read_text() for path in tmp_path.glob("mine.*")} == {"dear diary\n"}


async def test_a_limit_that_ran_out_is_told_by_its_option(simulator, bulk, photos, tmp_path):
    simulator.faults.append("slow_start=60,times=always")
    limits = ("--timeout", "0.1", "--retries", "0", "--limit", "2")
    said = await bulk("photos", "-o", "o.jsonl", "--report", "o.html", *limits, status=1)
    for text in (said, Page(tmp_path / "o.html").text):
        assert "(--timeout)" in text
        assert "Timeout." not in text


# -- what ends it, and how it goes on -----------------------------------------------


ASKS = ("--ask", "size=How wide is it?", "--ask", "kind=Is it a {kind}?")
KILLED = {  # its arguments, its lines, and how often it asks about a picture
    "lines": (["photos", "-o", "o.jsonl"], "o.jsonl", 1),
    "rows": (["photos", "-o", "o.csv.gz"], "o.csv.gz.jsonl", 1),
    "texts": (["photos", "-o", "o/"], "o/.moondream.jsonl", 1),
    "shards": (["in.tar", "-o", "o.tar"], "o.tar.jsonl", 1),
    "a table with two questions": (["in.csv", "-o", "o.jsonl", *ASKS], "o.jsonl", 2),
}


@pytest.mark.parametrize(("arguments", "lines", "questions"), KILLED.values(), ids=KILLED)
async def test_after_kill_9_it_goes_on_and_holds_each_picture_once(
    simulator, bulk, started, tmp_path, *, arguments, lines, questions
):
    paths = make_pictures(tmp_path / "photos", 80).rglob("*.jpg")
    names = sorted(str(path.relative_to(tmp_path)) for path in paths)
    (tmp_path / "in.csv").write_text("\n".join(["path,kind", *(f"{name},cat" for name in names)]))
    with tarfile.open(tmp_path / "in.tar", "w") as shard:
        for name in names:
            shard.add(tmp_path / name, name)
    output, journal = tmp_path / arguments[2], tmp_path / lines
    async with started(*arguments) as program:
        await simulator.wait_until(lambda: len(simulator.requests) >= 50 * questions)
        program.kill()
        assert (await program.end())[0] == -signal.SIGKILL
    await simulator.wait_until(lambda: simulator.connections.open == 0)  # what it sent has come
    first = len(journal.read_bytes().splitlines())
    assert 0 < first < 80
    assert output in (journal, journal.parent) or not output.exists()
    with journal.open("ab") as file:
        file.write(b'{"path":"photos/00001.jp')  # as if it had been killed within a write
    asked = len(simulator.requests)
    await bulk(*arguments)
    assert len(simulator.requests) - asked <= questions * (80 - first + 1)
    found = records(journal)
    assert len(found) == len(set(paths_of(found))) == 80
    assert all(line.get("caption") or (line["size"] and line["kind"]) for line in found)
    if output.suffix == ".tar":
        with tarfile.open(output) as shard:
            assert sorted(name for name in shard.getnames() if name.endswith(".jpg")) == names
    elif questions == 1:
        rows = rows_of(output)
        assert len(rows) == len({path for path, text in rows if text}) == 80


async def test_only_what_changed_or_is_new_is_asked_again(simulator, bulk, photos, tmp_path):
    await bulk("photos", "-o", "out.jsonl")
    os.utime(photos / "00000.jpg", (1, 1))  # another time, the same picture
    Image.new("RGB", (30, 30), "red").save(photos / "00002.jpg")
    Image.new("RGB", (31, 31), "red").save(photos / "new.jpg")
    simulator.requests.clear()
    said = await bulk("photos", "-o", "out.jsonl")
    assert "2 answered, 0 failed, 19 done before" in said
    assert len(simulator.requests) == 2
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == len(set(paths_of(lines))) == 21


async def test_another_question_is_another_answer_in_the_same_file(bulk, photos, tmp_path):
    for question in ("How wide is it?", "How bright is it?"):
        said = await bulk("photos", "-o", "out.jsonl", "--skill", "query", "--question", question)
        assert "20 answered, 0 failed," in said
    assert len(records(tmp_path / "out.jsonl")) == 40


async def test_ctrl_c_finishes_what_is_under_way_and_the_rest_comes_later(
    simulator, bulk, started, photos, tmp_path
):
    simulator.faults.append("slow_start=0.3,times=4")
    async with started("photos", "-o", "out.jsonl") as program:
        await simulator.wait_until(lambda: len(simulator.requests) == 4)
        program.interrupt()
        assert (await program.end())[0] == 130
    lines = records(tmp_path / "out.jsonl")
    assert 4 <= len(lines) < 20
    said = await bulk("photos", "-o", "out.jsonl")
    assert f"{20 - len(lines)} answered, 0 failed, {len(lines)} done before" in said


@pytest.mark.parametrize(("grace", "twice"), [(60, True), (0.1, False)], ids=["twice", "grace"])
async def test_a_second_ctrl_c_or_the_end_of_the_grace_drops_the_requests(
    simulator, started, tmp_path, *, photos, grace, twice
):
    simulator.faults.append("slow_start=60,times=always")
    async with started("photos", "-o", "out.jsonl", "--grace", grace) as program:
        await simulator.wait_until(lambda: len(simulator.requests) == 4)
        program.interrupt()
        if twice:
            await program.until("stop now")
            program.interrupt()
        assert (await program.end())[0] == 130
    await simulator.wait_until(lambda: all(each.disconnected for each in simulator.requests))
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_ctrl_c_ends_waiting_for_paths_on_stdin(simulator, started, photos, tmp_path):
    async with started("-", "-o", "out.jsonl") as program:
        await program.tell(photos / "00000.jpg")
        await simulator.wait_until(lambda: len(simulator.requests) == 1)
        program.interrupt()
        assert (await program.end())[0] == 130
    assert len(records(tmp_path / "out.jsonl")) == 1


# -- its parts ----------------------------------------------------------------------


def found(name="a.jpg"):
    return Found(name, name)


def test_a_picture_file_is_read_once_and_known_by_its_contents(tmp_path):
    path = make_pictures(tmp_path, 1) / "00000.jpg"
    file = PictureFile(found(str(path)))
    assert file.contents is None
    assert file.read() == path.read_bytes()
    assert file.read() == b""
    assert file.contents.size == path.stat().st_size
