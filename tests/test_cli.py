"""The command line: the real program, in processes of its own, over real sockets."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import anyio
import pytest
from programs import PROGRAM, run, running, running_in_terminal
from raw_server import CHUNKED, DONE, EVENT_STREAM, RawServer, event, head, in_chunks

import moondream_async as md
from moondream_async.cli import main
from moondream_async.simulator import DIALECTS, Simulator
from moondream_async.simulator.faults import EFFECTS

WORDS = "A bright 640\N{MULTIPLICATION SIGN}480"  # the sample picture's first three tokens


def is_one_line(text):
    return text.startswith("moondream-async: ") and text.endswith("\n") and text.count("\n") == 1


@pytest.fixture
def captioning(simulator, photo):
    """Starts a caption of the sample, in one way or another."""

    def start(start=running, command=("moondream-async",), **options):
        options = {"TERM": "dumb", "MOONDREAM_ENDPOINT": simulator.endpoint} | options
        return start(*command, "caption", photo, **options)

    return start


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
    assert await run("--version") == (0, f"moondream-async {md.__version__}\n", "")


# -- answers as text --------------------------------------------------------------------


@pytest.mark.slow
async def test_caption_prints_the_same_text_however_it_is_asked_for(cli, simulator, client, photo):
    expected = (0, (await client.caption(photo)).caption + "\n", "")
    assert await cli("caption", photo) == expected
    assert await cli("caption", photo, "--no-stream") == expected
    from_stdin = ("caption", "-", "--endpoint", simulator.endpoint)
    assert await run(*from_stdin, stdin=photo.read_bytes()) == expected
    assert [request.stream for request in simulator.requests[1:]] == [True, False, True]


@pytest.mark.slow
async def test_options_reach_the_server(cli, simulator, photo):
    settings = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25}
    options = ["--max-tokens", 5, "--temperature", 0.5, "--top-p", 0.25, "--model", "m"]
    await cli("caption", photo, "--length", "short", *options, "--timeout", 60)
    await cli("query", photo, "How many?", "--no-reasoning", *options, "--timeout", 60)
    caption, query = (request.body for request in simulator.requests)
    assert (caption["length"], caption["model"], caption["settings"]) == ("short", "m", settings)
    assert (query["question"], query["model"], query["settings"]) == ("How many?", "m", settings)
    assert query["reasoning"] is False


@pytest.mark.slow
async def test_query_without_a_picture_sends_none(cli, simulator):
    status, output, errors = await cli("query", "What can you do?", "--no-image")
    assert (status, errors) == (0, "")
    assert "No picture came" in output
    assert "image_url" not in simulator.requests[-1].body


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
@pytest.mark.slow
async def test_reasoning_goes_to_stderr_and_the_answer_alone_to_stdout(cli, client, photo, how):
    expected = await client.query(photo, "What colour?", reasoning=True)
    status, output, errors = await cli("query", photo, "What colour?", "--reasoning", how)
    assert (status, output) == (0, expected.answer + "\n")
    assert errors == f"Reasoning: {expected.reasoning.text}\n"


@pytest.mark.slow
@pytest.mark.parametrize("where", [running, running_in_terminal], ids=["pipe", "terminal"])
async def test_pieces_are_shown_as_they_arrive(simulator, captioning, where):
    simulator.faults.append("stall=3")
    async with captioning(where) as program:
        await program.until(WORDS)  # nothing more comes, and nothing has ended
        assert program.runs


@pytest.mark.slow
async def test_what_a_terminal_would_obey_does_not_reach_it(captioning):
    said = event("a\x1b[2Jb\x07\tc\x9b1md"), DONE

    async def play(peer):
        await peer.request()
        await peer.send(head(EVENT_STREAM, CHUNKED), in_chunks(*said))

    async with RawServer(play) as server:
        endpoint = {"MOONDREAM_ENDPOINT": server.endpoint}
        async with captioning(running_in_terminal, **endpoint) as program:
            status, shown, _ = await program.end()
        assert status == 0
        shown = re.sub(r"\s+", " ", shown).replace("\N{REPLACEMENT CHARACTER}", "?")
        assert shown.startswith("a?[2Jb? c?1md")
        async with captioning(**endpoint) as program:
            assert (await program.end())[1] == "a\x1b[2Jb\x07\tc\x9b1md\n"


@pytest.mark.slow
async def test_a_reader_who_goes_away_ends_it_quietly(simulator, captioning):
    simulator.faults.append("endless")
    async with captioning() as program:
        await program.until(WORDS)
        await program.look_away()
        assert await program.end() == (141, program.said, [])
    await simulator.requests[0].ended.wait()
    assert simulator.requests[0].disconnected


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
async def test_output_that_cannot_be_written_is_an_error(captioning):
    async with (
        await anyio.open_file("/dev/full", "wb") as full,
        captioning(stdout=full.wrapped) as program,
    ):
        status, _, errors = await program.end()
    assert status == 1
    assert len(errors) == 1


@pytest.mark.slow
async def test_a_closed_stdout_is_no_error(captioning):
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM]
    async with captioning(command=shell) as program:
        assert await program.end() == (0, "", [])


# -- answers as JSON --------------------------------------------------------------------

KEYS = {
    "caption": ["caption", "request_id", "finish_reason", "metrics", "ttft"],
    "query": ["answer", "reasoning", "request_id", "finish_reason", "metrics", "ttft"],
}


@pytest.mark.parametrize("skill", KEYS)
@pytest.mark.slow
async def test_json_is_one_object_with_all_keys(skill, cli, client, photo):
    arguments = [skill, photo, *["What colour?"] * (skill == "query")]
    expected = await getattr(client, skill)(*arguments[1:])
    status, output, errors = await cli(*arguments, "--json")
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
        endpoint = {"MOONDREAM_ENDPOINT": simulator.endpoint}
        status, output, _ = await run(*arguments, "--json", "--stream", **endpoint)
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
        endpoint = {"MOONDREAM_ENDPOINT": server.endpoint}
        _, output, _ = await run("caption", photo, "--json", "--stream", **endpoint)
    assert [json.loads(line) for line in output.splitlines()[:-1]] == [
        {"event": "chunk", "chunk": "Hi"},
        {"event": "metrics", "metrics": {"tokens": 1}},
        {"event": "unknown", "name": "mood", "raw": {"type": "mood", "value": 3}},
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "json_too", "shown"),
    [("ascii", ["--json"], f'{{"caption":"{WORDS}'), ("iso8859-5", [], "A bright 640?480")],
    ids=["JSON", "text"],
)
async def test_json_is_utf8_in_any_locale_and_text_shows_what_it_can(
    cli, photo, encoding, json_too, shown
):
    environment = {"PYTHONIOENCODING": encoding}
    status, output, _ = await cli("caption", photo, *json_too, **environment)
    assert (status, output[: len(shown)]) == (0, shown)


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
        ("batch", "Missing command"),
        ("segment photo.jpg", "OBJECT"),
        ("batch create photo.jpg --skill query", "--question"),
        ("batch create photo.jpg --skill point", "--object"),
        ("batch create photo.jpg --question Why?", "'--question' is not for '--skill caption'"),
        ("batch create photo.jpg --skill point --object a --length short", "'--length' is not"),
        ("batch create asked.jsonl --length short", "'--length' is for pictures"),
        ("batch create asked.jsonl --skill caption", "'--skill' is for pictures"),
        ("bulk photos -o a.jsonl --question Why?", "'--question' is not for '--skill caption'"),
        ("bulk photos -o a.jsonl --reasoning", "'--reasoning' is not for '--skill caption'"),
        ("bulk photos -o a.jsonl --ask a=Why? --length short", "'--length' is not for '--skill q"),
        ("bulk photos -o a.jsonl --skill detect --object \N{NO-BREAK SPACE}", "needs '--object'"),
        ("serve --port 65536", "--port"),
        ("serve --fault confetti", "confetti"),
        ("serve --dialect old --api-key word", "--api-key"),
    ],
)
def test_wrong_usage_is_one_line_however_narrow_the_terminal(args, hint, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(args.split(" ")) == 2
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
        ("stall=0", "0.5 seconds"),
    ],
)
@pytest.mark.slow
async def test_an_error_of_the_server_is_one_line(cli, simulator, photo, fault, hint):
    simulator.faults.append(f"{fault},times=always")
    limit = ["--timeout", "0.5"] * (fault == "stall=0")
    status, output, errors = await cli("caption", photo, *limit)
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert hint in errors


@pytest.mark.slow
async def test_no_picture_on_stdin_is_one_line(cli):
    status, output, errors = await cli("caption", "-")
    assert (status, output) == (1, "")
    assert is_one_line(errors)


@pytest.mark.slow
async def test_a_cut_stream_prints_what_had_arrived_and_then_the_error(cli, simulator, photo):
    simulator.faults.append("cut=3")
    status, output, errors = await cli("caption", photo)
    assert (status, output) == (1, WORDS + "\n")
    assert is_one_line(errors)


@pytest.mark.slow
async def test_on_a_terminal_the_error_begins_a_line_of_its_own(simulator, captioning):
    simulator.faults.append("cut=3")
    async with captioning(running_in_terminal) as program:
        status, shown, _ = await program.end()
    assert status == 1
    assert shown.startswith(f"{WORDS}\r\nmoondream-async: ")


@pytest.mark.slow
async def test_no_key_is_ever_shown(photo):
    async with Simulator(api_key="right") as simulator:
        environment = {"MOONDREAM_ENDPOINT": simulator.endpoint, "MOONDREAM_API_KEY": "wr0ng-key"}
        status, output, errors = await run("caption", photo, **environment)
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert "wr0ng-key" not in errors


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


@pytest.mark.parametrize("loading", ["msgspec", "typer"])  # of the package, of the command line
@pytest.mark.parametrize("how", ["-m", "script"])
def test_ctrl_c_while_it_loads_ends_it_without_a_word(tmp_path, loading, how):
    (tmp_path / f"{loading}.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    script = tmp_path / "moondream-async"
    script.write_text("from moondream_async.cli import main; raise SystemExit(main())")
    command = [sys.executable, *(PROGRAM[1:] if how == "-m" else [script]), "--version"]
    places = os.pathsep.join([str(tmp_path), *sys.path])
    environment = os.environ | {"PYTHONPATH": places}
    done = subprocess.run(command, check=False, capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_ctrl_c_in_a_program_that_imports_the_package_is_its_own(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import signal; import moondream_async\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    subprocess.run([sys.executable, script], check=True)


# -- demo -------------------------------------------------------------------------------


async def test_demo_needs_nothing_and_says_that_no_model_looks(client, photo):
    expected = (await client.caption(photo)).caption
    status, output, errors = await run("demo", "--rate", "0", TERM="xterm-256color")
    assert (status, output) == (0, expected + "\n")
    server, picture, request, *hints = filter(None, errors.splitlines())
    assert "No model is looking" in server
    assert "md.SAMPLE_IMAGE" in picture
    assert "pieces" in request
    assert [hint for hint in hints if "moondream-async demo --web" in hint]


async def test_demo_streams_at_its_rate_until_ctrl_c(interruptible):
    command = ("moondream-async", "demo", "--rate", "2")
    async with running_in_terminal(*command, TERM="dumb") as program:
        await program.until("A bright")
        assert program.runs
        program.interrupt()
        status, said, _ = await program.end()
    assert status == 130
    assert "Traceback" not in said


@pytest.mark.slow
async def test_demo_asks_the_given_server_about_the_given_picture(cli, simulator, tmp_path):
    picture = tmp_path / "grey.ppm"
    picture.write_bytes(b"P6 2 1 255 " + bytes(6))
    status, output, errors = await cli("demo", picture)
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
    command = ("moondream-async", "serve", "--port", "0", "--rate", "0")
    async with running(*command, *args) as program:
        await program.until("-d @-\n")
        exported = re.search(r"^export MOONDREAM_ENDPOINT=(\S+)$", program.said, re.MULTILINE)
        yield program, exported[1]


async def test_serve_prints_where_it_listens_and_ends_with_ctrl_c(photo, interruptible):
    async with serving("--dialect", "old") as (program, endpoint):
        assert not endpoint.endswith("/v1")
        status, output, _ = await run("caption", photo, MOONDREAM_ENDPOINT=endpoint)
        assert (status, output[: len(WORDS)]) == (0, WORDS)
        program.interrupt()
        assert await program.end() == (130, program.said, [])


def test_serve_offers_all_dialects():
    from moondream_async.cli.serve import Dialect

    assert get_args(Dialect) == tuple(DIALECTS)


def test_serve_lists_all_faults(capsys):
    assert main(["serve", "--fault", "help"]) == 0
    listed = {re.match(r"\w+", line)[0] for line in capsys.readouterr().out.splitlines()}
    assert listed >= set(EFFECTS)


@pytest.mark.slow
async def test_serve_lets_in_only_its_key_and_strikes_with_its_faults_in_turn(photo):
    given = ("--api-key", "0pen-sesame", "--fault", "cut=3", "--fault", "status=400")
    async with (
        serving(*given) as (program, endpoint),
        md.MoondreamClient("other", endpoint=endpoint) as other,
        md.MoondreamClient("0pen-sesame", endpoint=endpoint) as client,
    ):
        stream = await client.caption(photo, stream=True)
        with pytest.raises(md.StreamInterruptedError):
            await stream.text()
        with pytest.raises(md.BadRequestError):
            await client.caption(photo)
        await client.caption(photo)
        with pytest.raises(md.AuthenticationError):
            await other.caption(photo)
        assert "0pen-sesame" not in program.said


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
        line = program.said.splitlines()[-1]
        async with running("sh", "-c", line, MOONDREAM_API_KEY="word") as curl:
            await curl.until("640\N{MULTIPLICATION SIGN}480")
            assert curl.said.count("data:") == 3
            assert curl.runs
            program.interrupt()
            assert (await program.end())[0] == 130
            await curl.end()
