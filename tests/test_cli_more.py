"""The commands beyond caption and query: the real program against the simulator."""

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path

import anyio
import pytest
from forked import open_program, run_program
from PIL import Image

from moondream_async.simulator import Fault

pytestmark = pytest.mark.slow  # a process a test


@pytest.fixture
def program(simulator):
    """Run the program against the simulator; give its exit status, stdout and stderr."""

    async def run(*args, stdin=b""):
        with anyio.fail_after(60):
            env = {**os.environ, "MOONDREAM_ENDPOINT": simulator.endpoint}
            done = await run_program(args, input=stdin, env=env)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    return run


async def test_detect_prints_a_box_a_line_and_draws_them(program, photo, tmp_path):
    target = tmp_path / "found.png"
    status, out, errors = await program("detect", photo, "red circle", "--save", target)
    assert status == 0
    assert [float(number) for number in out.split()] == pytest.approx(
        [0.0938, 0.375, 0.3438, 0.7083], abs=0.01
    )
    assert str(target) in errors
    with Image.open(target) as drawn, Image.open(photo) as before:
        assert drawn.size == before.size
        assert drawn.convert("RGB").tobytes() != before.convert("RGB").tobytes()
    assert list(tmp_path.iterdir()) == [target]  # and nothing half written beside it


async def test_nothing_found_is_said_and_is_no_error(program, photo):
    status, out, errors = await program("detect", photo, "purple unicorn")
    assert (status, out) == (0, "")
    assert "Nothing found" in errors


async def test_point_gives_json(program, photo):
    status, out, _ = await program("point", photo, "blue square", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["points"][0] == pytest.approx({"x": 0.5156, "y": 0.6458}, abs=0.01)
    assert set(found) == {"points", "request_id", "finish_reason", "metrics"}


async def test_segment_prints_the_refined_path(program, photo):
    status, out, errors = await program("segment", photo, "red circle")
    assert status == 0
    assert out.startswith("M ")
    assert out.rstrip().endswith("Z")
    assert "translate(" in errors


async def test_segment_streams_its_events(program, photo):
    status, out, _ = await program("segment", photo, "red circle", "--json", "--stream")
    assert status == 0
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "bbox"
    assert {event["event"] for event in events[1:-1]} == {"chunk"}
    assert events[-1]["event"] == "final"
    assert events[-1]["path"].startswith("M ")


@pytest.mark.parametrize("target", ["found.bmp", "found", "missing/found.png"])
async def test_a_file_that_cannot_be_saved_is_refused_before_anything_is_asked(
    program, photo, tmp_path, simulator, target
):
    status, out, errors = await program("detect", photo, "circle", "--save", tmp_path / target)
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert simulator.requests == []


async def test_models_are_a_line_each(program):
    status, out, _ = await program("models")
    assert status == 0
    assert "moondream3-preview" in out.splitlines()
    _, out, _ = await program("models", "--json")
    assert {"id": "moondream3-preview", "object": "model"} in map(json.loads, out.splitlines())


async def test_chat_takes_a_message_a_line_and_remembers(program, photo, simulator):
    status, out, errors = await program(
        "chat", photo, "--system", "Be brief.", stdin=b"What colours?\nWhere is the red circle?\n"
    )
    assert (status, errors) == (0, "")
    assert len(out.splitlines()) == 2
    first, second = [request.body["messages"] for request in simulator.requests]
    assert [message["role"] for message in first] == ["system", "user"]
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == out.splitlines()[0]
    assert second[1]["content"][1]["type"] == "image_url"  # the picture is still there


async def test_chat_from_a_pipe_ends_at_the_first_error(program, simulator):
    simulator.faults.append(Fault.parse("status=400"))
    status, out, errors = await program("chat", stdin=b"Hello\nHello again\n")
    assert (status, out) == (1, "")
    assert len(errors.splitlines()) == 1
    assert len(simulator.requests) == 1


def sleeps(pid):
    """Whether a process waits for something; True where the system doesn't tell."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "S"


class Terminal:
    """A program in a terminal: what it prints, and keys to press."""

    def __init__(self, master, process):
        self._master = master
        self.process = process
        self.screen = ""

    async def until(self, text, *, after=0):
        """Wait until the screen shows `text` behind its first `after` characters."""
        with anyio.fail_after(60):
            while text not in self.screen[after:]:
                await anyio.wait_readable(self._master)
                self.screen += os.read(self._master, 65536).decode(errors="replace")

    async def until_more_than(self, text):
        """Wait until something is shown behind `text`."""
        with anyio.fail_after(60):
            while self.screen.endswith(text):
                await anyio.wait_readable(self._master)
                self.screen += os.read(self._master, 65536).decode(errors="replace")

    async def interrupt(self):
        """Press Ctrl-C once the prompt waits for keys.

        Python's `input` misses one that comes between the prompt and the wait, and hears of
        it with the next key. No person is so fast, and a busy machine is.
        """
        with anyio.fail_after(60):
            while not sleeps(self.process.pid):
                await anyio.sleep(0.01)
        self.press("\x03")

    def press(self, keys):
        os.write(self._master, keys.encode())


@contextlib.asynccontextmanager
async def terminal(*args, endpoint):
    master, slave = pty.openpty()
    environment = {**os.environ, "MOONDREAM_ENDPOINT": endpoint, "TERM": "dumb"}
    try:
        process = await open_program(
            args,
            stdin=slave,
            stdout=slave,
            stderr=subprocess.STDOUT,
            env=environment,
            in_control=True,  # so that Ctrl-C reaches it
        )
        os.close(slave)
        async with process:
            try:
                yield Terminal(master, process)
            finally:
                if process.returncode is None:
                    process.kill()
    finally:
        os.close(master)


async def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(simulator):
    simulator.faults.append(Fault.parse("stall=3"))
    async with terminal("chat", endpoint=simulator.endpoint) as shell:
        await shell.until("> ")
        shell.press("Tell me a story\n")
        await shell.until("story\r\n")
        await shell.until_more_than("story\r\n")  # the answer has begun
        seen = len(shell.screen)
        shell.press("\x03")
        await shell.until("Stopped.", after=seen)
        await shell.until("> ", after=shell.screen.index("Stopped."))
        with anyio.fail_after(60):
            await simulator.requests[0].ended.wait()
        assert simulator.requests[0].disconnected
        shell.press("And now?\n")
        with anyio.fail_after(60):
            await simulator.wait_until(lambda: len(simulator.requests) == 2)
        messages = simulator.requests[1].body["messages"]
        assert messages[0]["content"] == "Tell me a story"
        assert messages[-1]["content"] == "And now?"
        shell.press("/quit\n")
        with anyio.fail_after(60):
            assert await shell.process.wait() == 0


async def test_ctrl_c_at_the_prompt_clears_it_and_only_a_second_one_leaves(simulator, photo):
    async with terminal("chat", endpoint=simulator.endpoint) as shell:
        await shell.until("> ")
        shell.press("half a line")
        await shell.until("half a line")
        await shell.interrupt()
        await shell.until("Ctrl-C once more")
        seen = len(shell.screen)
        await shell.until("> ", after=shell.screen.index("leaves"))
        shell.press(f"/image {photo}\n")  # and the first is forgotten
        await shell.until("goes with the next message", after=seen)
        seen = len(shell.screen)
        await shell.interrupt()
        await shell.until("Ctrl-C once more", after=seen)
        await shell.until("> ", after=shell.screen.rindex("leaves"))
        await shell.interrupt()
        with anyio.fail_after(60):
            assert await shell.process.wait() == 130
    assert "Traceback" not in shell.screen
    assert simulator.requests == []


async def test_chat_in_a_terminal_says_what_went_wrong_and_goes_on(simulator):
    simulator.faults.append(Fault.parse("status=400"))
    async with terminal("chat", endpoint=simulator.endpoint) as shell:
        await shell.until("> ")
        shell.press("Hello\n")
        await shell.until("400")
        await shell.until("> ", after=shell.screen.index("400"))
        shell.press("/image nowhere.png\n")
        await shell.until("no file nowhere.png")
        # What is pressed before the prompt is there is a line of its own to the terminal.
        await shell.until("> ", after=shell.screen.index("no file"))
        shell.press("\x04")
        with anyio.fail_after(60):
            assert await shell.process.wait() == 0


async def test_a_batch_goes_up_and_its_answers_come_down(program, photo, tmp_path):
    status, out, _ = await program(
        "batch", "create", photo, "--skill", "query", "--question", "What colours?"
    )
    assert status == 0
    batch = out.split()[0]
    status, out, _ = await program("batch", "wait", batch)
    assert status == 0
    assert "completed" in out
    target = tmp_path / "answers.jsonl"
    status, out, errors = await program("batch", "results", batch, "-o", target)
    assert (status, out) == (0, "")
    assert "1 answers" in errors
    answer = json.loads(target.read_text("utf-8"))
    assert answer["id"] == str(photo)
    assert "white" in answer["result"]["answer"]
    assert list(tmp_path.iterdir()) == [target]
    status, out, _ = await program("batch", "list")
    assert batch in out


async def test_batch_results_that_fail_leave_the_old_file(program, tmp_path):
    target = tmp_path / "answers.jsonl"
    target.write_text("old")
    status, _, errors = await program("batch", "results", "nothing", "-o", target)
    assert status == 1
    assert len(errors.splitlines()) == 1
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(["batch"], id="no-command"),
        pytest.param(["batch", "create", "x.jpg", "--skill", "query"], id="no-question"),
        pytest.param(["batch", "create", "x.jpg", "--skill", "point"], id="no-object"),
        pytest.param(["segment", "x.jpg"], id="no-object-to-segment"),
    ],
)
async def test_wrong_usage_is_one_line_and_status_2(program, simulator, args):
    status, out, errors = await program(*args)
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert simulator.requests == []
