"""A run of ``bulk``: what is asked and answered, what fails, and what ends it and goes on.

The files that it writes are in `test_bulk_files`, the pictures' places in `test_bulk_sources`
and `test_bulk_packed`.
"""

import os
import signal
import tarfile

import pytest
from bulk_runs import (
    Page,
    interrupt,
    kill,
    make_pictures,
    paths_of,
    picture,
    records,
    rows_of,
)
from commands import meanwhile

from moondream_async.simulator import Simulator, SimulatorThread

pytestmark = pytest.mark.slow  # on one Python version

OUT = ("-o", "out.jsonl")
QUERY = ("--skill", "query")
DETECT = ("--skill", "detect", "--object", "red")
BY_BATCH = ("--via", "batch-api")

# -- what comes out -----------------------------------------------------------------


def test_a_folder_gives_a_line_for_each_picture(bulk, photos, tmp_path):
    said = bulk("photos", *OUT)
    assert "20 answered, 0 failed" in said
    assert " tokens, 0:" in said
    assert "$" not in said  # only the cloud asks for money
    lines = records(tmp_path / "out.jsonl")
    assert paths_of(lines) == sorted(
        str(path.relative_to(tmp_path)) for path in photos.rglob("*.jpg")
    )
    assert all(line["caption"] and line["file"]["sha256"] for line in lines)


ASKED = [
    ("answer", *QUERY, "--question", "How wide is it?"),
    ("answer", *QUERY, "--question", "How bright is it?"),
    ("reasoning_text", *QUERY, "--question", "How large is it?", "--reasoning"),
    ("objects", *DETECT),
    ("points", "--skill", "point", "--object", "red"),
    ("outline", "--skill", "segment", "--object", "red"),
    ("caption", "--length", "short", "--max-tokens", "4"),
]


def test_every_skill_can_be_asked_and_each_question_has_a_line_of_its_own(bulk, photos, tmp_path):
    for count, (key, *asked) in enumerate(ASKED, 1):
        assert "1 answered, 0 failed," in bulk("photos/00000.jpg", *OUT, *asked)
        lines = records(tmp_path / "out.jsonl")
        assert len(lines) == count
        assert key in lines[-1]


def test_a_job_by_batch_gives_the_same_answers(bulk, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no picture")
    by_batch = ("photos", "-o", "two.jsonl", "--via", "batch-api")
    bulk("photos", "-o", "one.jsonl", status=1)
    bulk(*by_batch, status=1)
    one, two = (
        {line["path"]: line.get("caption") for line in records(tmp_path / name)}
        for name in ("one.jsonl", "two.jsonl")
    )
    assert one == two
    assert not (tmp_path / "two.jsonl.batches").exists()
    assert "0 answered, 1 failed, 20 done before" in bulk(*by_batch, status=1)


def test_what_a_run_would_take_is_told_and_nothing_asked(
    command, moondream_simulator, photos, tmp_path
):
    options = ("--dry-run", "--rate-limit", 2, "--limit", 10)
    _, said, _ = command("bulk", "photos", *OUT, *options)
    assert "10 pictures to ask about" in said
    assert "10 requests; 0 done before" in said
    assert "tokens, which cost $" in said
    assert "about 0:05 at 2 requests a second" in said
    assert moondream_simulator.requests == []
    assert not (tmp_path / "out.jsonl").exists()


# -- what fails ---------------------------------------------------------------------


def test_a_server_that_fails_and_refuses_costs_no_picture(
    bulk, moondream_simulator, photos, tmp_path
):
    for _ in range(3):  # a fifth of the requests fails, a tenth is refused
        moondream_simulator.faults.extend(["status=500,retry_after=0", "slow_start=0,times=3"])
        moondream_simulator.faults.extend(["status=429,retry_after=0", "status=503,retry_after=0"])
        moondream_simulator.faults.append("slow_start=0,times=2")
    bulk("photos", *OUT, "--retries", 6)
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == 20
    assert any(line["tries"] > 1 for line in lines)


def test_a_wrong_key_ends_it_with_one_line_and_is_nobodys_error(bulk, photos, tmp_path):
    with SimulatorThread(Simulator(api_key="right")) as simulator:
        keys = {"MOONDREAM_ENDPOINT": simulator.endpoint, "MOONDREAM_API_KEY": "wrong"}
        said = bulk("photos", *OUT, **keys, status=1)
    assert "Invalid API key" in said
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_server_that_is_away_ends_the_run_after_its_first_failures(
    bulk, photos, tmp_path, nobody
):
    said = bulk("photos", *OUT, "--retries", 0, MOONDREAM_ENDPOINT=nobody, status=1)
    assert "Stopped after 3 failures in a row" in said
    assert len(records(tmp_path / "out.jsonl")) < 20


def test_a_picture_that_is_removed_before_its_turn_is_told(
    bulk, moondream_simulator, photos, tmp_path
):
    held = moondream_simulator.script.caption("A cat.", hold_after=0)

    def remove():
        requests = moondream_simulator.requests
        moondream_simulator.wait_until(lambda: len(requests) == 1, timeout=60)
        for path in photos.rglob("*.jpg"):
            path.unlink()
        held.release()

    with meanwhile(remove):
        bulk("photos", *OUT, "--concurrency", 1, status=1)
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == 20
    assert any("No such file" in line.get("error", {}).get("message", "") for line in lines)


REFUSED = [
    (2, "Missing option", "photos"),
    (2, "Missing argument", *OUT),
    (2, "needs '--question'", "photos", *OUT, *QUERY),
    (2, "gives no text", "photos", "-o", "texts/", "--skill", "point", "--object", "red"),
    (2, "'--rate-limit': 0 is not over 0", "photos", *OUT, "--rate-limit", "0"),
    (2, "must end in", "photos", "-o", "outx"),
    (2, "must end in", "photos", "-o", "mine.json"),
    (1, "other things in it than results", "photos", "-o", "mine.jsonl"),
    (1, "no run has made it", "photos", "-o", "mine.csv"),
    (1, "no run has made it", "photos", "-o", "mine.parquet"),
    (1, "no run has made it", "photos", "-o", "mine.tar"),
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
    *(
        (1, f"'--ask {name}=...'", "photos", *OUT, "--ask", f"{name}=What is there?")
        for name in ("time", "objects", "points", "file")
    ),
    (1, "is damaged", "photos", "-o", "damaged.jsonl", "--via", "batch-api"),
    (1, "no JSON object", "mine.jsonl", *OUT),
    (1, "is no Parquet file", "mine.parquet", *OUT),
    (2, "it must be NAME=QUESTION", "photos", *OUT, "--ask", "a"),
    (2, "each name once", "photos", *OUT, "--ask", "a=A?", "--ask", "a=B?"),
    (2, "'--ask' is for query by requests", "photos", *OUT, "--ask", "a=A?", *DETECT[:2]),
    (2, "takes no '--skill segment'", "photos", *OUT, *BY_BATCH, "--skill", "segment", *DETECT[2:]),
    (1, "detect takes no settings", "photos", *OUT, *BY_BATCH, *DETECT, "--top-p", "0.5"),
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
    bulk, tmp_path, nobody, *, status, reason, arguments
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "in.csv").write_text("path\nphotos/00000.jpg\n")
    (tmp_path / "a.txt").write_text("photos/00000.jpg\n")
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    (tmp_path / "damaged.jsonl.batches").write_text('[{"batch": 5')
    for ending in ("json", "jsonl", "csv", "parquet", "tar", "html"):
        (tmp_path / f"mine.{ending}").write_text("dear diary\n")
    said = bulk(*arguments, MOONDREAM_ENDPOINT=nobody, status=status)
    assert reason in said
    assert status == 1 or said.count("\n") == 1
    assert {path.read_text() for path in tmp_path.glob("mine.*")} == {"dear diary\n"}


def test_a_limit_that_ran_out_is_told_by_its_option(bulk, moondream_simulator, photos, tmp_path):
    moondream_simulator.faults.append("slow_start=60,times=always")
    limits = ("--timeout", "0.1", "--retries", "0", "--limit", "2")
    said = bulk("photos", *OUT, "--report", "o.html", *limits, status=1)
    for text in (said, Page(tmp_path / "o.html").text):
        assert "(--timeout)" in text
        assert "Timeout." not in text


# -- what ends it, and how it goes on -----------------------------------------------


ASKS = ("--ask", "size=How wide is it?", "--ask", "kind=Is it a {kind}?")
KILLED = {  # its arguments, its lines, and how often it asks about a picture
    "rows": (["photos", "-o", "o.csv.gz"], "o.csv.gz.jsonl", 1),
    "texts": (["photos", "-o", "o/"], "o/.moondream.jsonl", 1),
    "shards": (["in.tar", "-o", "o.tar"], "o.tar.jsonl", 1),
    "a table with two questions": (["in.csv", "-o", "o.jsonl", *ASKS], "o.jsonl", 2),
}


@pytest.mark.parametrize(("arguments", "lines", "questions"), KILLED.values(), ids=KILLED)
def test_after_kill_9_it_goes_on_and_holds_each_picture_once(
    moondream_simulator, bulk, bulk_until, tmp_path, *, arguments, lines, questions
):
    paths = make_pictures(tmp_path / "photos", 60).rglob("*.jpg")
    names = sorted(str(path.relative_to(tmp_path)) for path in paths)
    (tmp_path / "in.csv").write_text("\n".join(["path,kind", *(f"{name},cat" for name in names)]))
    with tarfile.open(tmp_path / "in.tar", "w") as shard:
        for name in names:
            shard.add(tmp_path / name, name)
    output, journal = tmp_path / arguments[2], tmp_path / lines
    requests = moondream_simulator.requests

    ended = bulk_until(*arguments, when=40 * questions, end=kill)
    assert ended == -signal.SIGKILL
    # What it sent has come.
    moondream_simulator.wait_until(lambda: moondream_simulator.connections.open == 0, timeout=60)
    first = len(journal.read_bytes().splitlines())
    assert 0 < first < 60
    assert output in (journal, journal.parent) or not output.exists()
    with journal.open("ab") as file:
        file.write(b'{"path":"photos/00001.jp')  # as if it had been killed within a write
    asked = len(requests)
    bulk(*arguments)
    assert len(requests) - asked <= questions * (60 - first + 1)
    found = records(journal)
    assert len(found) == len(set(paths_of(found))) == 60
    assert all(line.get("caption") or (line["size"] and line["kind"]) for line in found)
    if output.suffix == ".tar":
        with tarfile.open(output) as shard:
            assert sorted(name for name in shard.getnames() if name.endswith(".jpg")) == names
    elif questions == 1:
        rows = rows_of(output)
        assert len(rows) == len({path for path, text in rows if text}) == 60


def test_only_what_changed_or_is_new_is_asked_again(bulk, moondream_simulator, photos, tmp_path):
    bulk("photos", *OUT)
    os.utime(photos / "00000.jpg", (1, 1))  # another time, the same picture
    (photos / "00002.jpg").write_bytes(picture(40))
    (photos / "new.jpg").write_bytes(picture(41))
    (photos / "00004.jpg").unlink()  # its answer is known
    moondream_simulator.requests.clear()
    assert "2 answered, 0 failed, 19 done before" in bulk("photos", "photos/00004.jpg", *OUT)
    assert len(moondream_simulator.requests) == 2
    lines = records(tmp_path / "out.jsonl")
    assert len(lines) == len(set(paths_of(lines))) == 21


def test_only_questions_that_failed_are_asked_again(bulk, moondream_simulator, photos, tmp_path):
    arguments = ("photos", "-o", "o.jsonl", "--ask", "a=How wide?", "--ask", "b=How high?")
    (photos / "00000.jpg").write_bytes(b"")
    moondream_simulator.faults.extend(["status=400"] * 5)
    assert "failed: BadRequestError" in bulk(*arguments, status=1)
    kinds = [line["error"]["type"] for line in records(tmp_path / "o.jsonl") if "error" in line]
    assert kinds.count("ImageError") == 1
    failed = len(kinds)
    (photos / "00000.jpg").write_bytes(picture())
    moondream_simulator.requests.clear()
    assert f"{failed} answered, 0 failed, {20 - failed} done before" in bulk(*arguments)
    assert len(moondream_simulator.requests) == 5 + 2
    lines = records(tmp_path / "o.jsonl")
    assert len(lines) == 20
    assert all(line["a"] and line["b"] for line in lines)


def test_answers_about_a_picture_that_changed_are_asked_for_again(
    bulk, moondream_simulator, tmp_path
):
    photos = make_pictures(tmp_path / "photos", 1)
    asked = ("photos", *OUT, "--ask", "a=How wide?", "--ask", "b=How high?", "--concurrency", 1)
    moondream_simulator.faults.extend(["slow_start=0", "status=400"])  # the second one fails
    bulk(*asked, status=1)
    (photos / "00000.jpg").write_bytes(picture(9))
    bulk(*asked)
    assert len(moondream_simulator.requests) == 2 + 2


def test_a_limit_stops_after_so_many_and_the_next_run_goes_on(bulk, photos, tmp_path):
    for done in (0, 8, 16):
        assert f"{min(8, 20 - done)} answered" in bulk("photos", *OUT, "--limit", 8)
    assert len(records(tmp_path / "out.jsonl")) == 20


def test_ctrl_c_finishes_what_is_under_way_and_the_rest_comes_later(
    moondream_simulator, bulk, bulk_until, photos, tmp_path
):
    simulator = moondream_simulator
    held = simulator.script.caption("A cat.", times=4, hold_after=0)

    async def interrupt_and_release(program):
        program.interrupt()
        await program.until("Finishing what is under way")
        held.release()

    assert bulk_until("photos", *OUT, when=4, end=interrupt_and_release) == 130
    lines = records(tmp_path / "out.jsonl")
    assert 4 <= len(lines) < 20
    assert f"{len(lines)} done before" in bulk("photos", *OUT)


@pytest.mark.parametrize(("grace", "twice"), [(60, True), (0.1, False)], ids=["twice", "grace"])
def test_a_second_ctrl_c_or_the_end_of_the_grace_drops_the_requests(
    moondream_simulator, bulk_until, tmp_path, *, photos, grace, twice
):
    simulator = moondream_simulator
    simulator.faults.append("slow_start=60,times=always")

    async def end(program):
        program.interrupt()
        if twice:
            await program.until("stop now")
            program.interrupt()

    assert bulk_until("photos", *OUT, "--grace", grace, when=4, end=end) == 130
    simulator.wait_until(lambda: all(each.disconnected for each in simulator.requests), timeout=60)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_ctrl_c_ends_waiting_for_paths_on_stdin(moondream_simulator, bulk_until, photos, tmp_path):
    async def end(program):
        await program.tell(photos / "00000.jpg")
        requests = moondream_simulator.requests
        await moondream_simulator.until(lambda: len(requests) == 1, timeout=60)
        program.interrupt()

    assert bulk_until("-", *OUT, when=0, end=end) == 130
    assert len(records(tmp_path / "out.jsonl")) == 1


def test_a_batch_that_was_left_is_fetched_and_not_paid_for_again(
    moondream_simulator, bulk, bulk_until, photos, tmp_path
):
    arguments = ("photos", *OUT, "--via", "batch-api")
    assert bulk_until(*arguments, when="has 20 pictures", end=interrupt) == 130
    assert (tmp_path / "out.jsonl.batches").exists()
    assert "20 answered" in bulk(*arguments)
    assert len(records(tmp_path / "out.jsonl")) == 20
    created = [
        each for each in moondream_simulator.requests if each.query.get("action") == "mpu-create"
    ]
    assert len(created) == 1
