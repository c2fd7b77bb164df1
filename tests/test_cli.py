"""The command line: the real program, in processes of its own, over real sockets."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import anyio
import anyio.to_thread
import pytest
from forked import open_program, run_program
from raw_server import CHUNKED, DONE, EVENT_STREAM, RawServer, event, head, in_chunks

import moondream_async as md
from moondream_async.cli import main
from moondream_async.simulator import DIALECTS, Simulator
from moondream_async.simulator.faults import EFFECTS

pytest.importorskip("typer", reason="the extra cli is not installed")
pytest.importorskip("rich", reason="the extra cli is not installed")

PROGRAM = [sys.executable, "-m", "moondream_async"]
WORDS = "A bright 640\N{MULTIPLICATION SIGN}480"  # the sample picture's first three tokens

PATIENCE = 60  # seconds; less than pytest's, which would leave a program that hangs behind


async def run(*args, stdin=b"", afresh=False, **environment):
    """Run the program to its end; return its exit status, stdout and stderr."""
    env = {**os.environ, **environment}
    with anyio.fail_after(PATIENCE):
        if afresh:
            done = await anyio.run_process([*PROGRAM, *map(str, args)], check=False, env=env)
        else:
            done = await run_program(args, input=stdin, env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Running:
    """A program on its way, whose output is read as it comes."""

    def __init__(self, process):
        self.process = process
        self._printed = b""

    @property
    def output(self):
        """All of stdout that was read."""
        return self._printed.decode(errors="replace")  # a character may be on its way

    async def until(self, text):
        """Read stdout until `text` was printed."""
        while text not in self.output:
            try:
                self._printed += await self.process.stdout.receive()
            except anyio.EndOfStream:
                errors = await read(self.process.stderr)
                raise AssertionError(f"{text!r} not in {self.output!r}; {errors}") from None

    def interrupt(self):
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    async def end(self):
        """Wait for its end; return its exit status, all of stdout, and stderr."""
        self._printed += await read(self.process.stdout)
        errors = await read(self.process.stderr)
        return await self.process.wait(), self.output, errors.decode()


async def read(stream):
    """Read the rest of a stream; None is a stream that goes elsewhere."""
    return b"".join([data async for data in stream]) if stream else b""


@contextlib.asynccontextmanager
async def start(*args, command=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **environment):
    """Start the program, and see to it that it has ended; outputs can be a `Screen` each."""
    screens = {each for each in (stdout, stderr) if isinstance(each, Screen)}
    outputs = {
        "stdout": stdout.write_end if stdout in screens else stdout,
        "stderr": stderr.write_end if stderr in screens else stderr,
        "env": {**os.environ, **environment},
    }
    if command is None:
        process = await open_program(args, **outputs)
    else:
        process = await anyio.open_process([*command, *map(str, args)], **outputs)
    async with process:
        try:
            for screen in screens:
                screen.hand_over()
            with anyio.fail_after(PATIENCE):
                yield Running(process)
        finally:
            if process.returncode is None:
                process.kill()


class Screen:
    """A pipe or a terminal: the program writes to one end of it, the test reads the other."""

    def __init__(self, read_end, write_end):
        self.write_end = write_end
        self._read_end = read_end
        self._shown = b""

    @property
    def text(self):
        """What was seen so far."""
        return self._shown.decode(errors="replace")

    async def until(self, text):
        """Read until `text` was seen."""
        while text not in self.text:
            data = b""
            with contextlib.suppress(OSError):  # which is how a terminal ends
                data = await anyio.to_thread.run_sync(os.read, self._read_end, 4096)
            assert data, f"{text!r} not in {self.text!r}"
            self._shown += data

    def hand_over(self):
        """Leave the end to write to to the program, so that the other end sees when it is gone."""
        os.close(self.write_end)
        self.write_end = None

    def go_away(self):
        """Read no more."""
        os.close(self._read_end)
        self._read_end = None

    def close(self):
        for end in (self._read_end, self.write_end):
            if end is not None:
                os.close(end)


@pytest.fixture
def terminal():
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    with contextlib.closing(Screen(*pty.openpty())) as terminal:
        yield terminal


@pytest.fixture
def pipe():
    with contextlib.closing(Screen(*os.pipe())) as pipe:
        yield pipe


def is_one_line(text):
    return text.startswith("moondream-async: ") and text.endswith("\n") and text.count("\n") == 1


# -- starting ---------------------------------------------------------------------------


async def test_without_its_extra_it_says_what_to_install(tmp_path):
    for name in ("moondream_async", "msgspec"):  # a site directory with no more than these
        (found,) = importlib.util.find_spec(name).submodule_search_locations
        (tmp_path / name).symlink_to(found)
    command = [sys.executable, "-S", "-m", "moondream_async", "demo"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = await anyio.run_process(command, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert "pip install 'moondream-async[cli]'" in done.stderr.decode()
    assert is_one_line(done.stderr.decode())


def test_installed_program_is_the_same_as_the_module():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="moondream-async")
    assert script.value == "moondream_async.cli:main"


@pytest.mark.slow
async def test_help_and_wrong_usage_load_neither_aiohttp_nor_pillow():
    code = """if True:
        import sys
        from moondream_async.cli import main
        for args in ["", "--version", "caption --help", "serve --help", "caption", "query a.jpg"]:
            main(args.split())
        print("loaded", sorted({"aiohttp", "anyio", "PIL"} & set(sys.modules)))"""
    done = await anyio.run_process([sys.executable, "-c", code])
    assert done.stdout.decode().splitlines()[-1] == "loaded []"


@pytest.mark.slow
async def test_without_arguments_it_prints_its_help():
    status, output, errors = await run()
    assert (status, errors) == (0, "")
    assert output == (await run("--help"))[1]
    assert re.search(r"^  demo ", output, re.MULTILINE)


async def test_version_is_the_packages():
    assert await run("--version", afresh=True) == (0, f"moondream-async {md.__version__}\n", "")


# -- answers as text --------------------------------------------------------------------


@pytest.mark.slow
async def test_caption_prints_the_streamed_text_and_ends_the_line(simulator, client, photo):
    expected = (await client.caption(photo)).caption
    assert await run("caption", photo, "--endpoint", simulator.endpoint) == (0, expected + "\n", "")
    assert simulator.requests[-1].stream is True


@pytest.mark.slow
async def test_no_stream_prints_the_same_text(simulator, photo):
    arguments = ("caption", photo, "--endpoint", simulator.endpoint)
    assert await run(*arguments, "--no-stream") == await run(*arguments)
    assert [request.stream for request in simulator.requests] == [False, True]


@pytest.mark.slow
async def test_the_endpoint_can_come_from_the_environment(simulator, photo):
    status, output, _ = await run("caption", photo, MOONDREAM_ENDPOINT=simulator.endpoint)
    assert (status, output[: len(WORDS)]) == (0, WORDS)


@pytest.mark.slow
async def test_picture_can_come_from_stdin(simulator, photo):
    arguments = ("--endpoint", simulator.endpoint)
    piped = await run("caption", "-", *arguments, stdin=photo.read_bytes())
    assert piped == await run("caption", photo, *arguments)


@pytest.mark.slow
async def test_options_reach_the_server(simulator, photo):
    settings = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25}
    options = ["--max-tokens", 5, "--temperature", 0.5, "--top-p", 0.25, "--model", "m"]
    options += ["--timeout", 60, "--endpoint", simulator.endpoint]
    await run("caption", photo, "--length", "short", *options)
    await run("query", photo, "How many?", "--no-reasoning", *options)
    caption, query = (request.body for request in simulator.requests)
    assert (caption["length"], caption["model"], caption["settings"]) == ("short", "m", settings)
    assert (query["question"], query["model"], query["settings"]) == ("How many?", "m", settings)
    assert query["reasoning"] is False


@pytest.mark.slow
async def test_query_without_a_picture_sends_none(simulator):
    options = ("--no-image", "--endpoint", simulator.endpoint)
    status, output, errors = await run("query", "What can you do?", *options)
    assert (status, errors) == (0, "")
    assert "No picture came" in output
    assert "image_url" not in simulator.requests[-1].body


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
@pytest.mark.slow
async def test_reasoning_goes_to_stderr_and_the_answer_alone_to_stdout(
    simulator, client, photo, how
):
    expected = await client.query(photo, "What colour?", reasoning=True)
    status, output, errors = await run(
        "query", photo, "What colour?", "--reasoning", how, "--endpoint", simulator.endpoint
    )
    assert (status, output) == (0, expected.answer + "\n")
    assert errors == f"Reasoning: {expected.reasoning.text}\n"


@pytest.mark.slow
async def test_pieces_go_through_a_pipe_as_they_arrive(simulator, photo):
    simulator.faults.append("stall=3")
    async with start("caption", photo, "--endpoint", simulator.endpoint) as program:
        await program.until(WORDS)  # nothing more comes, and nothing has ended
        assert program.process.returncode is None


@pytest.mark.slow
async def test_pieces_show_on_a_terminal_as_they_arrive(simulator, photo, terminal):
    simulator.faults.append("stall=3")
    async with start(
        "caption", photo, "--endpoint", simulator.endpoint, stdout=terminal
    ) as program:
        await terminal.until(WORDS)
        assert program.process.returncode is None


@pytest.mark.slow
async def test_what_a_terminal_would_obey_does_not_reach_it(photo, terminal):
    said = event("a\x1b[2Jb\x07\tc\x9b1md"), DONE

    async def play(peer):
        await peer.request()
        await peer.send(head(EVENT_STREAM, CHUNKED), in_chunks(*said))

    async with RawServer(play) as server:
        arguments = ("caption", photo, "--endpoint", server.endpoint)
        async with start(*arguments, stdout=terminal) as program:
            await terminal.until("d")
            assert (await program.end())[0] == 0
        shown = re.sub(r"\s+", " ", terminal.text).replace("\N{REPLACEMENT CHARACTER}", "?")
        assert shown.startswith("a?[2Jb? c?1md")
        assert (await run(*arguments))[1] == "a\x1b[2Jb\x07\tc\x9b1md\n"


@pytest.mark.slow
async def test_a_reader_who_goes_away_ends_it_quietly(simulator, photo, pipe):
    simulator.faults.append("endless")
    arguments = ("caption", photo, "--endpoint", simulator.endpoint)
    async with start(*arguments, stdout=pipe) as program:
        await pipe.until(WORDS)
        pipe.go_away()
        assert await program.end() == (141, "", "")
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected


@pytest.fixture
def full():
    """A file on a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("wb") as file:
        yield file


@pytest.mark.slow
async def test_output_that_cannot_be_written_is_an_error(simulator, photo, full):
    async with start("caption", photo, "--endpoint", simulator.endpoint, stdout=full) as program:
        status, _, errors = await program.end()
    assert status == 1
    assert is_one_line(errors)


@pytest.mark.slow
async def test_a_closed_stdout_is_no_error(simulator, photo):
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM]
    arguments = ("caption", photo, "--endpoint", simulator.endpoint)
    async with start(*arguments, command=shell) as program:
        assert await program.end() == (0, "", "")


# -- answers as JSON --------------------------------------------------------------------

KEYS = {
    "caption": ["caption", "request_id", "finish_reason", "metrics", "ttft"],
    "query": ["answer", "reasoning", "request_id", "finish_reason", "metrics", "ttft"],
}


@pytest.mark.parametrize("skill", KEYS)
@pytest.mark.slow
async def test_json_is_one_object_with_all_keys(skill, simulator, client, photo):
    arguments = [skill, photo, *["What colour?"] * (skill == "query")]
    expected = await getattr(client, skill)(*arguments[1:])
    status, output, errors = await run(*arguments, "--json", "--endpoint", simulator.endpoint)
    assert (status, errors, output.count("\n")) == (0, "", 1)
    answer = json.loads(output)
    assert list(answer) == KEYS[skill]
    assert answer[KEYS[skill][0]] == expected[KEYS[skill][0]]
    assert answer["request_id"]
    assert answer["finish_reason"] == "stop"
    assert answer["metrics"]["output_tokens"] == expected.metrics["output_tokens"]
    assert answer["ttft"] is None


@pytest.mark.parametrize("skill", KEYS)
@pytest.mark.slow
async def test_json_of_a_stream_is_a_line_for_each_event(skill, client, photo):
    arguments = [skill, photo, *["What colour?"] * (skill == "query")]
    text = (await getattr(client, skill)(*arguments[1:]))[KEYS[skill][0]]
    async with Simulator("kestrel") as simulator:
        status, output, _ = await run(
            *arguments, "--json", "--stream", "--endpoint", simulator.endpoint
        )
    assert status == 0
    *events, final = map(json.loads, output.splitlines())
    assert {each["event"] for each in events} == {"chunk"}
    assert "".join(each["chunk"] for each in events) == text
    assert list(final) == ["event", *KEYS[skill]]
    assert final["event"] == "final"
    assert final[KEYS[skill][0]] == text
    assert final["finish_reason"] == "stop"
    assert final["ttft"] > 0


@pytest.mark.slow
async def test_json_of_a_stream_tells_of_metrics_and_unknown_events(photo):
    said = event("Hi"), event(stats={"tokens": 1}), event(type="mood", value=3), DONE

    async def play(peer):
        await peer.request()
        await peer.send(head(EVENT_STREAM, CHUNKED), in_chunks(*said))

    async with RawServer(play) as server:
        _, output, _ = await run(
            "caption", photo, "--json", "--stream", "--endpoint", server.endpoint
        )
    assert [json.loads(line) for line in output.splitlines()[:-1]] == [
        {"event": "chunk", "chunk": "Hi"},
        {"event": "metrics", "metrics": {"tokens": 1}},
        {"event": "unknown", "name": "mood", "raw": {"type": "mood", "value": 3}},
    ]


@pytest.mark.slow
async def test_json_is_utf8_in_any_locale(simulator, photo):
    _, output, _ = await run(
        *("caption", photo, "--json", "--endpoint", simulator.endpoint),
        PYTHONIOENCODING="ascii",
        afresh=True,
    )
    assert json.loads(output)["caption"].startswith(WORDS)


@pytest.mark.slow
async def test_text_that_the_locale_cannot_show_is_no_error(simulator, photo):
    status, output, _ = await run(
        *("caption", photo, "--endpoint", simulator.endpoint),
        PYTHONIOENCODING="iso8859-5",
        afresh=True,
    )
    assert (status, output[:16]) == (0, "A bright 640?480")


# -- errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("captoin photo.jpg", "captoin"),
        ("--loud", "--loud"),
        ("caption", "IMAGE"),
        ("caption photo.jpg --length tall", "short"),
        ("caption photo.jpg --top-p 1.5", "--top-p"),
        ("caption photo.jpg --top-p 0", "--top-p"),
        ("caption photo.jpg --timeout 0", "--timeout"),
        ("query photo.jpg", "QUESTION"),
        ("query photo.jpg Why? --no-image", "--no-image"),
        ("serve --port 65536", "--port"),
        ("serve --fault confetti", "confetti"),
        ("serve --dialect old --api-key word", "--api-key"),
    ],
)
def test_wrong_usage_is_one_line_however_narrow_the_terminal(args, hint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(args.split()) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert is_one_line(errors)
    assert hint in errors
    assert "--help" in errors


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ("status=400", "Simulated error 400"),
        ("html=400", "Error 400"),
        ("error_event=0", "Inference failed"),
    ],
)
@pytest.mark.slow
async def test_an_error_of_the_server_is_one_line(simulator, photo, fault, hint):
    simulator.faults.append(f"{fault},times=always")
    status, output, errors = await run("caption", photo, "--endpoint", simulator.endpoint)
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert hint in errors


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("caption {photo}", "MOONDREAM_API_KEY"),
        ("caption none.jpg --endpoint {nobody}", "none.jpg"),
        ("caption {photo} --endpoint nowhere", "nowhere"),
        ("query {photo} _ --endpoint {nobody}", "{nobody}"),
    ],
    ids=["no key", "no picture", "no address", "no server"],
)
def test_errors_without_an_answer_are_one_line(args, hint, photo, capsys):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # and nobody listens
        nobody = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        assert main([each.format(photo=photo, nobody=nobody) for each in args.split()]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert is_one_line(errors)
    assert hint.format(nobody=nobody) in errors


@pytest.mark.slow
async def test_no_picture_on_stdin_is_one_line(simulator):
    status, output, errors = await run("caption", "-", "--endpoint", simulator.endpoint)
    assert (status, output) == (1, "")
    assert is_one_line(errors)


@pytest.mark.slow
async def test_a_timeout_is_one_line(simulator, photo):
    simulator.faults.append("stall=0,times=always")
    status, _, errors = await run(
        "caption", photo, "--timeout", "0.05", "--endpoint", simulator.endpoint
    )
    assert status == 1
    assert is_one_line(errors)
    assert "0.05 seconds" in errors


@pytest.mark.slow
async def test_a_cut_stream_prints_what_had_arrived_and_then_the_error(simulator, photo):
    simulator.faults.append("cut=3")
    status, output, errors = await run("caption", photo, "--endpoint", simulator.endpoint)
    assert (status, output) == (1, WORDS + "\n")
    assert is_one_line(errors)


@pytest.mark.slow
async def test_on_a_terminal_the_error_begins_a_line_of_its_own(simulator, photo, terminal):
    simulator.faults.append("cut=3")
    async with start(
        *("caption", photo, "--endpoint", simulator.endpoint),
        stdout=terminal,
        stderr=terminal,
    ) as program:
        assert await program.process.wait() == 1
        await terminal.until("complete")
    assert terminal.text.startswith(f"{WORDS}\r\nmoondream-async: ")


@pytest.mark.slow
async def test_no_key_is_ever_shown(photo):
    async with Simulator(api_key="right") as simulator:
        status, output, errors = await run(
            *("caption", photo, "--endpoint", simulator.endpoint), MOONDREAM_API_KEY="wr0ng-key"
        )
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert "wr0ng-key" not in errors


# -- Ctrl-C -----------------------------------------------------------------------------


async def test_ctrl_c_while_it_streams_closes_the_connection(simulator, photo, interruptible):
    simulator.faults.append("stall=3")
    arguments = ("caption", photo, "--endpoint", simulator.endpoint)
    async with start(*arguments, command=PROGRAM) as program:
        await program.until(WORDS)
        program.interrupt()
        assert await program.end() == (130, WORDS + "\n", "")
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected


async def test_ctrl_c_while_it_waits_for_the_answer_closes_the_connection(
    simulator, photo, interruptible
):
    simulator.faults.append("slow_start=3600")
    async with start("caption", photo, "--endpoint", simulator.endpoint) as program:
        await simulator.wait_until(lambda: simulator.requests)
        program.interrupt()
        assert await program.end() == (130, "", "")
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected


async def test_ctrl_c_while_it_waits_for_another_try_ends_it(simulator, photo, interruptible):
    simulator.faults.append("status=503,retry_after=60")
    async with start("caption", photo, "--endpoint", simulator.endpoint) as program:
        await simulator.wait_until(lambda: simulator.requests)
        await simulator.requests[0].ended.wait()
        program.interrupt()
        assert await program.end() == (130, "", "")


async def test_ctrl_c_while_it_reads_stdin_ends_it(simulator, interruptible):
    async with start("caption", "-", "--endpoint", simulator.endpoint) as program:
        await program.process.stdin.send(bytes(1_000_000))  # more than a pipe holds
        program.interrupt()
        assert await program.end() == (130, "", "")


# -- demo -------------------------------------------------------------------------------


async def test_demo_needs_nothing_and_says_that_no_model_looks(client, photo):
    expected = (await client.caption(photo)).caption
    status, output, errors = await run("demo", "--rate", "0")
    assert (status, output) == (0, expected + "\n")
    server, picture, request, *hints = filter(None, errors.splitlines())
    assert "No model is looking" in server
    assert "md.SAMPLE_IMAGE" in picture
    assert "pieces" in request
    assert [hint for hint in hints if "moondream-async demo --web" in hint]


async def test_demo_streams_at_its_rate_until_ctrl_c(interruptible, terminal):
    async with start("demo", "--rate", "2", stdout=terminal) as program:
        await terminal.until("A bright")
        assert program.process.returncode is None
        program.interrupt()
        status, _, errors = await program.end()
    assert status == 130
    assert "Traceback" not in errors


@pytest.mark.slow
async def test_demo_asks_the_given_server_about_the_given_picture(simulator, tmp_path):
    picture = tmp_path / "grey.ppm"
    picture.write_bytes(b"P6 2 1 255 " + bytes(6))
    status, output, errors = await run("demo", picture, MOONDREAM_ENDPOINT=simulator.endpoint)
    assert status == 0
    assert "2\N{MULTIPLICATION SIGN}1" in output
    assert simulator.endpoint in errors
    assert str(picture) in errors
    assert "No model" not in errors
    assert len(simulator.requests) == 1


def test_demo_with_a_key_asks_the_cloud(capsys, monkeypatch):
    monkeypatch.setenv("MOONDREAM_API_KEY", "a\nb")  # refused before anything is sent
    assert main(["demo"]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert "MOONDREAM_API_KEY must be" in errors


# -- serve ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(*args):
    """Run ``serve`` on a free port; yields the program and its endpoint."""
    async with start("serve", "--port", "0", "--rate", "0", *args) as program:
        await program.until("-d @-\n")
        yield (
            program,
            re.search(r"^export MOONDREAM_ENDPOINT=(\S+)$", program.output, re.MULTILINE)[1],
        )


async def test_serve_prints_where_it_listens_and_ends_with_ctrl_c(photo, interruptible):
    async with serving("--dialect", "old") as (program, endpoint):
        assert not endpoint.endswith("/v1")
        status, output, _ = await run("caption", photo, MOONDREAM_ENDPOINT=endpoint)
        assert (status, output[: len(WORDS)]) == (0, WORDS)
        program.interrupt()
        assert await program.end() == (130, program.output, "")


def test_serve_offers_all_dialects():
    from moondream_async.cli.serve import Dialect

    assert get_args(Dialect) == tuple(DIALECTS)


def test_serve_lists_all_faults(capsys):
    assert main(["serve", "--fault", "help"]) == 0
    listed = {re.match(r"\w+", line)[0] for line in capsys.readouterr().out.splitlines()}
    assert listed >= set(EFFECTS)


@pytest.mark.slow
async def test_serve_strikes_with_its_faults_in_turn(photo):
    faults = ("--fault", "cut=3", "--fault", "status=400")
    async with serving(*faults) as (_, endpoint), md.MoondreamClient(endpoint=endpoint) as client:
        stream = await client.caption(photo, stream=True)
        with pytest.raises(md.StreamInterruptedError):
            await stream.text()
        with pytest.raises(md.BadRequestError):
            await client.caption(photo)
        await client.caption(photo)


@pytest.mark.slow
async def test_serve_lets_in_only_its_key_and_does_not_print_it(photo):
    async with serving("--api-key", "0pen-sesame") as (program, endpoint):
        assert "0pen-sesame" not in program.output
        async with md.MoondreamClient("other", endpoint=endpoint) as client:
            with pytest.raises(md.AuthenticationError):
                await client.caption(photo)
        async with md.MoondreamClient("0pen-sesame", endpoint=endpoint) as client:
            await client.caption(photo)


def test_serve_on_a_port_in_use_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert is_one_line(errors)
    assert f"127.0.0.1:{port}" in errors


@pytest.mark.slow
async def test_the_curl_line_of_serve_prints_events_as_they_are_made(interruptible):
    if not all(map(shutil.which, ("sh", "curl", "base64"))):
        pytest.skip("curl, base64 or a shell is not installed")
    async with serving("--fault", "stall=3", "--api-key", "word") as (program, _):
        line = program.output.splitlines()[-1]
        async with start(line, command=["sh", "-c"], MOONDREAM_API_KEY="word") as curl:
            await curl.until("640\N{MULTIPLICATION SIGN}480")
            assert curl.output.count("data:") == 3
            assert curl.process.returncode is None
            program.interrupt()
            assert (await program.end())[0] == 130
            await curl.end()
