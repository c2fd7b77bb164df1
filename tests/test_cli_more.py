"""The commands beyond caption and query: the real program against the simulator."""

import json
import os
import shlex
from pathlib import Path

import anyio
import pytest
from PIL import Image
from programs import PROGRAM, running_in_terminal

pytestmark = pytest.mark.slow  # a process a test


async def test_detect_prints_a_box_a_line_and_draws_them(cli, photo, tmp_path):
    target = tmp_path / "found.png"
    status, out, errors = await cli("detect", photo, "red circle", "--save", target)
    assert status == 0
    assert [float(number) for number in out.split()] == pytest.approx(
        [0.0938, 0.375, 0.3438, 0.7083], abs=0.01
    )
    assert str(target) in errors
    with Image.open(target) as drawn, Image.open(photo) as before:
        assert drawn.size == before.size
        assert drawn.convert("RGB").tobytes() != before.convert("RGB").tobytes()
    assert list(tmp_path.iterdir()) == [target]  # and nothing half written beside it


_NOTHING = "Nothing found."
_EMPTY = "The answer is empty."


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("detect {photo} unicorn", _NOTHING),
        ("point {photo} unicorn", _NOTHING),
        ("segment {photo} unicorn", _NOTHING),
        ("segment {photo} unicorn --stream", _NOTHING),
        ("caption {photo}", _EMPTY),
        ("query {photo} Why? --no-stream", _EMPTY),
        ("chat", _EMPTY),
    ],
)
async def test_nothing_found_or_said_is_told_and_is_no_error(cli, photo, simulator, asked, said):
    for scripted in (simulator.script.caption, simulator.script.query, simulator.script.chat):
        scripted("", times=None)
    status, out, errors = await cli(*asked.format(photo=photo).split(), stdin=b"Why?\n")
    assert (status, out, errors) == (0, "", f"{said}\n")


async def test_point_gives_json(cli, photo):
    status, out, _ = await cli("point", photo, "blue square", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["points"][0] == pytest.approx({"x": 0.5156, "y": 0.6458}, abs=0.01)
    assert set(found) == {"points", "request_id", "finish_reason", "metrics"}


async def test_segment_prints_the_refined_path(cli, photo):
    status, out, errors = await cli("segment", photo, "red circle")
    assert status == 0
    assert out.startswith("M ")
    assert out.rstrip().endswith("Z")
    assert "translate(" in errors


async def test_segment_streams_its_events(cli, photo):
    status, out, _ = await cli("segment", photo, "red circle", "--json", "--stream")
    assert status == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "bbox"
    assert {event["event"] for event in events[1:-1]} == {"chunk"}
    assert events[-1]["event"] == "final"
    assert events[-1]["path"].startswith("M ")


@pytest.mark.parametrize("target", ["found.bmp", "found", "missing/found.png", "folder.png"])
async def test_a_file_that_cannot_be_saved_is_refused_before_anything_is_asked(
    cli, photo, tmp_path, simulator, target
):
    (tmp_path / "folder.png").mkdir()
    status, out, errors = await cli("detect", photo, "circle", "--save", tmp_path / target)
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert simulator.requests == []


async def test_models_are_a_line_each(cli):
    status, out, _ = await cli("models")
    assert status == 0
    assert "moondream3-preview" in out.splitlines()
    _, out, _ = await cli("models", "--json")
    assert {"id": "moondream3-preview", "object": "model"} in map(json.loads, out.splitlines())


async def test_chat_takes_a_message_a_line_and_remembers(cli, photo, simulator):
    status, out, errors = await cli(
        "chat", photo, "--system", "Be brief.", stdin=b"What colours?\nWhere is the red circle?\n"
    )
    assert (status, errors) == (0, "")
    assert len(out.splitlines()) == 2
    first, second = [request.body["messages"] for request in simulator.requests]
    assert [message["role"] for message in first] == ["system", "user"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == out.splitlines()[0]
    assert second[1]["content"][1]["type"] == "image_url"  # the picture is still there


@pytest.mark.parametrize(
    ("closed", "typed", "ends"),
    [
        ("<&-", "", (1, "", "moondream-async: Can't read stdin: it is closed\n")),
        (">&-", "Hello", (0, "", "")),
        ("2>&-", "Hello", (0, "Hi.\n", "")),
        ("", "\\377", (1, "", "moondream-async: What stdin gives is no text: ")),
    ],
    ids=["stdin closed", "stdout closed", "stderr closed", "no text"],
)
async def test_chat_needs_no_stream_that_it_does_not_use(simulator, closed, typed, ends):
    simulator.script.chat("Hi.")
    asked = f"{shlex.join(PROGRAM)} chat --endpoint {simulator.endpoint} {closed}"
    shell = ["sh", "-c", f"printf '{typed}\\n' | {asked}"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = await anyio.run_process(shell, check=False, env=env)
    status, output, errors = ends
    assert (done.returncode, done.stdout.decode()) == (status, output)
    assert done.stderr.decode().startswith(errors)
    assert done.stderr.count(b"\n") <= 1


async def test_chat_from_a_pipe_ends_at_the_first_error(cli, simulator):
    simulator.faults.append("status=400")
    status, out, errors = await cli("chat", stdin=b"Hello\nHello again\n")
    assert (status, out) == (1, "")
    assert len(errors.splitlines()) == 1
    assert len(simulator.requests) == 1


def sleeps(pid):
    """Whether a process waits for something; True where the system doesn't tell."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "S"


async def interrupt(shell):
    """Press Ctrl-C once the prompt waits for keys.

    Python's `input` misses one that comes between the prompt and the wait, and hears of
    it with the next key. No person is so fast, and a busy machine is.
    """
    while not sleeps(shell.pid):
        await anyio.sleep(0.01)
    shell.press(b"\x03")


@pytest.fixture
async def shell(simulator):
    """``chat`` in a terminal, at its prompt."""
    environment = {"MOONDREAM_ENDPOINT": simulator.endpoint, "TERM": "dumb"}
    async with running_in_terminal("moondream-async", "chat", **environment) as shell:
        await shell.until("> ")
        yield shell


async def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(shell, simulator):
    simulator.faults.append("stall=3")
    shell.press(b"Tell me a story\n")
    await shell.until("story\r\n")
    await shell.until(lambda said: not said.endswith("story\r\n"))  # the answer has begun
    seen = len(shell.said)
    shell.press(b"\x03")
    await shell.until("Stopped.", after=seen)
    await shell.until("> ", after=shell.said.index("Stopped."))
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected
    shell.press(b"And now?\n")
    await simulator.wait_until(lambda: len(simulator.requests) == 2)
    messages = simulator.requests[1].body["messages"]
    assert messages[0]["content"] == "Tell me a story"
    assert messages[-1]["content"] == "And now?"
    shell.press(b"/quit\n")
    assert (await shell.end())[0] == 0


async def test_ctrl_c_at_the_prompt_clears_it_and_only_a_second_one_leaves(shell, simulator, photo):
    shell.press(b"half a line")
    await shell.until("half a line")
    await interrupt(shell)
    await shell.until("Ctrl-C once more")
    seen = len(shell.said)
    await shell.until("> ", after=shell.said.index("leaves"))
    shell.press(f"/image {photo}\n".encode())  # and the first is forgotten
    await shell.until("goes with the next message", after=seen)
    seen = len(shell.said)
    await interrupt(shell)
    await shell.until("Ctrl-C once more", after=seen)
    await shell.until("> ", after=shell.said.rindex("leaves"))
    await interrupt(shell)
    status, said, _ = await shell.end()
    assert (status, "Traceback" in said, simulator.requests) == (130, False, [])


async def test_chat_in_a_terminal_says_what_went_wrong_and_goes_on(shell, simulator):
    simulator.faults.append("status=400")
    shell.press(b"Hello\n")
    await shell.until("400")
    await shell.until("> ", after=shell.said.index("400"))
    shell.press(b"/image nowhere.png\n")
    await shell.until("no file nowhere.png")
    # What is pressed before the prompt is there is a line of its own to the terminal.
    await shell.until("> ", after=shell.said.index("no file"))
    shell.press(b"\x04")
    assert (await shell.end())[0] == 0


async def test_a_batch_goes_up_and_its_answers_come_down(cli, photo, tmp_path):
    status, out, _ = await cli(
        "batch", "create", photo, "--skill", "query", "--question", "What colours?"
    )
    assert status == 0
    batch = out.split()[0]
    status, out, _ = await cli("batch", "wait", batch)
    assert status == 0
    assert "completed" in out
    target = tmp_path / "answers.jsonl"
    status, out, errors = await cli("batch", "results", batch, "-o", target)
    assert (status, out) == (0, "")
    assert "1 answers" in errors
    answer = json.loads(target.read_text("utf-8"))
    assert answer["id"] == str(photo)
    assert "white" in answer["result"]["answer"]
    assert list(tmp_path.iterdir()) == [target]
    status, out, _ = await cli("batch", "list")
    assert batch in out


async def test_a_folder_that_takes_no_file_is_told_by_the_name_that_was_given(cli, tmp_path):
    target = tmp_path / "missing" / "answers.jsonl"
    status, _, errors = await cli("batch", "results", "nothing", "-o", target)
    assert (status, errors.count("\n")) == (1, 1)
    assert f"'{target}'" in errors


async def test_batch_results_that_fail_leave_the_old_file(cli, tmp_path):
    target = tmp_path / "answers.jsonl"
    target.write_text("old")
    status, _, errors = await cli("batch", "results", "nothing", "-o", target)
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
