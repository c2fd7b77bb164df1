"""What needs a process or a terminal: Ctrl-C, streams that close, what a terminal obeys."""

import contextlib
import io
import json
import os
import shlex
import sys
import unicodedata
from pathlib import Path

import anyio
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import PROGRAM, run, running, running_in_terminal
from remote_server import serving_pages

from moondream_async.cli import main

pytestmark = pytest.mark.slow  # most tests run the program

WORDS = "A bright 640\N{MULTIPLICATION SIGN}480"  # the sample picture's first three tokens


@pytest.fixture
def captioning(simulator, photo):
    """Starts a caption of the sample, in one way or another."""

    def start(start=running, command=("moondream-async",), **options):
        options = {"TERM": "dumb", "MOONDREAM_ENDPOINT": simulator.endpoint} | options
        return start(*command, "caption", photo, **options)

    return start


@pytest.mark.parametrize("where", [running, running_in_terminal], ids=["pipe", "terminal"])
async def test_pieces_are_shown_as_they_arrive(simulator, captioning, where):
    simulator.faults.append("stall=3")
    async with captioning(where) as program:
        await program.until(WORDS)  # nothing more comes, and nothing has ended
        assert program.runs


async def test_on_a_terminal_the_error_begins_a_line_of_its_own(simulator, captioning):
    simulator.faults.append("cut=3")
    async with captioning(running_in_terminal) as program:
        status, shown, _ = await program.end()
    assert status == 1
    assert shown.startswith(f"{WORDS}\r\nmoondream-async: ")


async def test_where_nobody_listens_it_says_so_tries_again_and_names_what_does(nobody, photo):
    args = ("caption", photo, "--endpoint", nobody)
    async with running_in_terminal("moondream-async", *args, TERM="dumb") as program:
        status, said, _ = await program.end()
    port = nobody.split(":")[2].removesuffix("/v1")
    assert status == 1
    assert said.count("Trying again in ") == 3
    flat = said.replace("\r\n", "")
    assert "Connection refused" in flat
    assert f"moondream-async serve --port {port}" in flat
    async with running("moondream-async", *args) as program:
        _, _, errors = await program.end()
    assert len(errors) == 1  # and in a pipe, the error alone


# -- streams ----------------------------------------------------------------------------


async def test_a_reader_who_goes_away_ends_it_quietly(simulator, captioning):
    simulator.faults.append("endless")
    async with captioning() as program:
        await program.until(WORDS)
        await program.look_away()
        assert await program.end() == (141, program.said, [])
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
async def test_output_that_cannot_be_written_is_an_error(captioning):
    async with (
        await anyio.open_file("/dev/full", "wb") as full,
        captioning(stdout=full.wrapped) as program,
    ):
        status, _, errors = await program.end()
    assert (status, len(errors)) == (1, 1)


@pytest.mark.parametrize(
    ("asked", "typed", "ends"),
    [
        ("chat <&-", "", (1, "", "moondream-async: Can't read stdin: it is closed\n")),
        ("chat >&-", "Hello", (0, "", "")),
        ("chat 2>&-", "Hello", (0, "Hi.\n", "")),
        ("caption {photo} >&-", "", (0, "", "")),
    ],
)
async def test_no_stream_is_needed_that_is_not_used(simulator, photo, asked, typed, ends):
    simulator.script.chat("Hi.")
    program = f"{shlex.join(PROGRAM)} {asked.format(photo=photo)}"
    shell = ["sh", "-c", f"printf '{typed}\\n' | {program}"]
    told = {"MOONDREAM_ENDPOINT": simulator.endpoint, "PYTHONIOENCODING": "utf-8:strict"}
    done = await anyio.run_process(shell, check=False, env=os.environ | told)
    status, output, errors = ends
    assert (done.returncode, done.stdout.decode()) == (status, output)
    assert done.stderr.decode().startswith(errors)
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize(
    ("encoding", "json_too", "shown"),
    [("ascii", ["--json"], f'{{"caption":"{WORDS}'), ("iso8859-5", [], "A bright 640?480")],
    ids=["JSON", "text"],
)
async def test_json_is_utf8_in_any_locale_and_text_shows_what_it_can(
    simulator, photo, encoding, json_too, shown
):
    told = {"MOONDREAM_ENDPOINT": simulator.endpoint, "PYTHONIOENCODING": encoding}
    status, output, _ = await run("caption", photo, *json_too, **told)
    assert (status, output[: len(shown)]) == (0, shown)


# -- Ctrl-C -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "shown", "command"),
    [
        ("stall=3", WORDS, PROGRAM),
        ("slow_start=3600", "", ["moondream-async"]),
        ("status=503,retry_after=60", "", ["moondream-async"]),
    ],
    ids=["while it streams", "while it waits for the answer", "while it waits for another try"],
)
async def test_ctrl_c_ends_it_and_closes_the_connection(
    simulator, captioning, interruptible, *, fault, shown, command
):
    simulator.faults.append(fault)
    refused = "503" in fault
    async with captioning(command=command) as program:
        await program.until(shown)
        await simulator.wait_until(
            lambda: simulator.requests and simulator.requests[0].ended.is_set() == refused
        )
        program.interrupt()
        assert await program.end() == (130, shown and f"{shown}\n", [])
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected != refused


async def test_ctrl_c_while_it_reads_stdin_ends_it(simulator, interruptible):
    command = ("moondream-async", "caption", "-", "--endpoint", simulator.endpoint)
    async with running(*command) as program:
        await program.tell("x" * 1_000_000)  # more than a pipe holds
        program.interrupt()
        assert await program.end() == (130, "", [])


# -- chat -------------------------------------------------------------------------------


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


# -- what a server says reaches a terminal as text, and never as an order to it --------------

ORDERS = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\x08\r\x00\u202e\u2066"
BOX = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.5, "y_max": 0.5}


class Server:
    """Says the same in every place that a command could print."""

    said = f"a{ORDERS}b"
    refuses = False

    async def answer(self, request):
        said, asked = self.said, await request.json() if request.can_read_body else {}
        if self.refuses:
            error = {"message": said, "code": said, "type": said}
            return web.json_response({"error": error}, status=400)
        if asked.get("stream"):
            body = "".join(f"data: {each}\n\n" for each in self.events(chat="messages" in asked))
            return web.Response(text=body, content_type="text/event-stream")
        batch = {
            "id": said,
            "status": "completed",
            "progress": {"total": 1, "completed": 1, "failed": 0},
            "outputs": [{"index": 0, "url": str(request.url.with_path("/output"))}],
        }
        result = {"line_index": 0, "id": said, "status": "ok", "result": {"caption": said}}
        texts = ["caption", "answer", "path", "request_id", "finish_reason"]
        answer = {
            **dict.fromkeys(texts, said),
            "reasoning": {"text": said, "grounding": []},
            "metrics": {said: said},
            "objects": [BOX],
            "points": [{"x": 0.5, "y": 0.5}],
            "bbox": BOX,
        }
        answers = {
            "models": {"data": [{"id": said, "name": said, "description": said}]},
            "batch": {"batches": [batch, batch | {"error": {"code": said, "message": said}}]},
            "output": result,
            "b": batch,
        }
        return web.json_response(answers.get(request.path.rpartition("/")[2], answer))

    def events(self, *, chat):
        said = self.said
        if chat:
            choice = {"delta": {"content": said}, "finish_reason": said}
            return [json.dumps({"choices": [choice]}), "[DONE]"]
        names = ["request_id", "finish_reason", "path", "parse_error"]
        end = {"chunk": "", "completed": True, "type": "final", "metrics": {said: 1}}
        events = [
            {"chunk": said},
            {"type": said, "value": said},
            {"reasoning": said},
            {"stats": {said: said}},
            end | dict.fromkeys(names, said),
        ]
        return map(json.dumps, events)


@pytest.fixture
def server():
    server = Server()
    with serving_pages(web.route("*", "/{path:.*}", server.answer)) as server.origin:
        yield server


class Terminal(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", errors="replace", write_through=True)

    def isatty(self):
        return True


def shown_by(server, args, typed=""):
    """Run a command on a terminal; return all that came there, and its exit status."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(typed))
        patch.setenv("TERM", "dumb")
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            status = main([*args, "--endpoint", f"{server.origin}/v1"])
    terminal.flush()
    return terminal.buffer.getvalue().decode("utf-8"), status


def is_order(character):
    """Whether a terminal could do something else than show it."""
    return (unicodedata.category(character) == "Cc" and character not in "\n\t") or (
        character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


COMMANDS = {
    "caption": ["caption", "{photo}"],
    "caption-json": ["caption", "{photo}", "--json"],
    "query": ["query", "{photo}", "What?", "--reasoning"],
    "query-whole": ["query", "{photo}", "What?", "--no-stream"],
    "query-events": ["query", "{photo}", "What?", "--json", "--stream"],
    "detect-json": ["detect", "{photo}", "cat", "--json"],
    "segment": ["segment", "{photo}", "cat"],
    "segment-stream": ["segment", "{photo}", "cat", "--stream"],
    "segment-events": ["segment", "{photo}", "cat", "--json", "--stream"],
    "chat": ["chat"],
    "chat-json": ["chat", "--json"],
    "models": ["models"],
    "models-json": ["models", "--json"],
    "batch-list": ["batch", "list"],
    "batch-list-json": ["batch", "list", "--json"],
    "batch-get": ["batch", "get", "b"],
    "batch-wait-json": ["batch", "wait", "b", "--json"],
    "batch-results": ["batch", "results", "b"],
    "demo": ["demo"],
    "bulk": ["bulk", "{photo}", "-o", "{folder}/{refuses}.jsonl"],
    "bulk-lines": ["bulk", "{photo}", "-o", "-"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_control_sequence_reaches_a_terminal(command, server, photo, tmp_path):
    for server.refuses in (False, True):
        names = {"photo": photo, "folder": tmp_path, "refuses": server.refuses}
        args = [each.format(**names) for each in COMMANDS[command]]
        shown, status = shown_by(server, args, "Hello\n")
        assert status == server.refuses
        assert [each for each in shown if is_order(each)] == []
        if "json" in command or "events" in command:
            answers = [json.loads(line) for line in shown.splitlines() if line[:1] == "{"]
            assert bool(answers) == (status == 0)
            said = str(answers).encode().decode("unicode_escape")
            assert not answers or server.said in said


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    said=st.text(st.characters(exclude_categories=()), min_size=1),
    command=st.sampled_from(["caption", "query-whole", "query-events", "batch-list"]),
)
def test_any_text_is_shown_as_text(said, command, server, photo):
    server.said = said
    shown, _ = shown_by(server, [each.format(photo=photo) for each in COMMANDS[command]])
    assert [each for each in shown if is_order(each)] == []


def test_other_programs_get_text_as_it_is_and_json_that_reads_back_the_same(command, server, photo):
    said = f"{ORDERS.replace(chr(13), '')} \U000e0041 \N{ZERO WIDTH JOINER} \N{GRINNING FACE} é"
    server.said, endpoint = said, ("--endpoint", f"{server.origin}/v1")
    assert command("caption", photo, *endpoint) == (0, f"{said}\n", "")
    _, line, _ = command("caption", photo, "--json", *endpoint)
    assert json.loads(line)["caption"] == said
    assert "é" in line
    assert [each for each in line if is_order(each)] == []
