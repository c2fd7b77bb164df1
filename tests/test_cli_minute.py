"""The first minute: what a terminal shows, and how errors say what to do next."""

import socket
import sys
from contextlib import closing

import anyio
import pytest
from canned import canned
from programs import run, running, running_in_terminal
from raw_server import whole
from test_cli import is_one_line

import moondream_async as md
from moondream_async.cli import main
from moondream_async.cli._words import own_name
from moondream_async.simulator import Simulator, SimulatorThread

pytestmark = pytest.mark.slow  # most tests run the program

HALF = "\N{UPPER HALF BLOCK}"


def lines(screen):
    return screen.replace("\r\n", "\n").split("\n")


# -- demo ---------------------------------------------------------------------------------


async def test_demo_shows_the_picture_and_wraps_the_answer_at_words():
    async with running_in_terminal("moondream-async", "demo", "--rate", "0") as program:
        status, said, _ = await program.end()
    assert status == 0
    shown = lines(said)
    picture = [number for number, line in enumerate(shown) if HALF in line]
    assert len(picture) > 8
    assert all(line.count(HALF) <= 79 for line in shown)
    text = shown[picture[-1] + 1 :]
    answer = " ".join(line for line in text if line and "\x1b" not in line)
    async with Simulator() as simulator, md.MoondreamClient(endpoint=simulator.endpoint) as client:
        assert answer == (await client.caption(md.SAMPLE_IMAGE)).caption
    assert max(len(line) for line in text if "\x1b" not in line) < 80
    assert "demo --web" in said
    assert "demo PICTURE" in said


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
async def test_demo_without_colours_shows_the_text_alone(environment):
    async with running_in_terminal(
        "moondream-async", "demo", "--rate", "0", **environment
    ) as program:
        status, said, _ = await program.end()
    assert (status, HALF in said) == (0, False)
    assert "A bright" in said


@pytest.mark.parametrize("opens", [True, False])
async def test_demo_opens_the_page_in_the_browser(opens, tmp_path, interruptible):
    note = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {note}.part\nmv {note}.part {note}\n')
    browser.chmod(0o755)
    args = ("demo", "--web", "--port", "0", *["--no-open"] * (not opens))
    async with running("moondream-async", *args, BROWSER=f"{browser} %s") as program:
        await program.until("/\n")
        with anyio.fail_after(60):
            while opens and not note.exists():
                await anyio.sleep(0.01)
        program.interrupt()
        status, said, errors = await program.end()
    assert (status, "Traceback" in str(errors)) == (130, False)
    assert note.exists() == opens
    assert not opens or note.read_text() == said


@pytest.mark.parametrize(
    ("called", "on_path", "typed"),
    [
        (".venv/bin/moondream-async", False, ".venv/bin/moondream-async"),
        (".venv/bin/moondream-async", True, "moondream-async"),
        ("moondream_async/__main__.py", False, "moondream-async"),
    ],
)
def test_the_next_step_can_be_typed_as_it_stands(called, on_path, typed, tmp_path, monkeypatch):
    program = tmp_path / ".venv/bin/moondream-async"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setenv("PATH", str(program.parent) if on_path else "")
    assert own_name() == typed


# -- in the command line's own words ------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("caption {photo}", (1, "MOONDREAM_API_KEY", "api_key=")),
        ("caption {photo}", (1, "--endpoint", "endpoint=")),
        (
            "caption {photo} --endpoint nowhere",
            (1, "--endpoint, or MOONDREAM_ENDPOINT", "endpoint "),
        ),
        ("query {photo} _ --endpoint {nobody}", (1, "QUESTION must not be empty", "question must")),
        ("detect {photo} _ --endpoint {nobody}", (1, "OBJECT must not be empty", "object must")),
        ("caption {photo} --model _ --endpoint {nobody}", (1, "--model must not be empty", "'")),
        ("caption a.jpg b.jpg", (2, "moondream-async bulk", "Traceback")),
        ("detect a.jpg cat b.jpg", (2, "moondream-async bulk", "Traceback")),
        (
            "caption http://127.0.0.1:{port}/x.jpg --endpoint {nobody}",
            (1, "not on the public internet", "Errno"),
        ),
        ("caption ~/none.jpg --endpoint {nobody}", (1, "{home}/none.jpg", "~")),
        ("demo --no-open", (2, "'--web'", "Traceback")),
        ("caption {photo} --timeout inf", (2, "'--timeout': inf is not", "None")),
        (
            "caption {photo} --endpoint {nobody} --timeout 0.05",
            (1, "0.05 seconds (--timeout)", "Timeout."),
        ),
        (
            "HTTPS_PROXY=SOCKS5://A caption {photo} --endpoint https://a.example",
            (1, "not 'SOCKS5://A'. Unset it to use none.", "False"),
        ),
        ("watch {camera} --endpoint {nobody}", (1, "Could not connect to {camera}", "serve")),
        ("caption {photo} --endpoint {plain}", (1, "[SSL", "serve")),
    ],
)
def test_errors_speak_of_options_and_variables(
    args, expected, photo, capsys, *, home, nobody, monkeypatch
):
    status, says, not_says = expected
    with closing(socket.create_server(("127.0.0.1", 0))) as bound, SimulatorThread() as simulator:
        port = bound.getsockname()[1]
        names = {"photo": photo, "port": port, "home": home, "camera": nobody.removesuffix("/v1")}
        names["nobody"] = f"http://127.0.0.1:{port}/v1"
        names["plain"] = simulator.endpoint.replace("http:", "https:")
        given = [each.format(**names) if each != "_" else "" for each in args.split()]
        if given[0].isupper():
            monkeypatch.setenv(*given.pop(0).split("="))
        assert main(given) == status
    output, errors = capsys.readouterr()
    assert output == ""
    assert is_one_line(errors)
    assert says.format(**names) in errors
    assert not_says not in errors.removeprefix("moondream-async: ").replace("MOONDREAM_", "")


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


@pytest.mark.parametrize(
    ("path", "hinted"), [("", True), ("/api", True), ("/v1", False), ("/v1/", False)]
)
async def test_a_404_without_v1_asks_whether_it_was_meant(path, hinted, photo):
    not_found = whole({"error": "no such page"}, status="404 Not Found")
    async with canned(not_found) as (_, server):
        async with md.MoondreamClient(endpoint=f"{server.origin}{path}") as client:
            with pytest.raises(md.NotFoundError) as caught:
                await client.caption(photo)
        assert (f"did you mean {server.origin}{path}/v1?" in str(caught.value)) == hinted


# -- and what else a terminal has ---------------------------------------------------------


@pytest.mark.parametrize("args", ["-v caption {}", "caption {} -v", "caption --verbose {}"])
async def test_verbose_writes_a_line_for_what_the_client_does(args, simulator, photo):
    given = args.format(photo).split()
    async with running("moondream-async", *given, "--endpoint", simulator.endpoint) as program:
        status, said, errors = await program.end()
    assert status == 0
    assert said.startswith("A bright")
    assert any("POST /caption" in line and "200" in line for line in errors)


async def test_serve_writes_a_line_for_each_request(photo, interruptible):
    async with running("moondream-async", "serve", "--port", "0", "--rate", "0") as program:
        await program.until("-d @-\n")
        endpoint = program.said.split("MOONDREAM_ENDPOINT=")[1].split()[0]
        async with md.MoondreamClient(endpoint=endpoint) as client:
            await client.caption(photo)
            await program.until(" POST /v1/caption 200 ")
            await (await client.query(photo, "Why?", stream=True)).text()
            await program.until(" POST /v1/query 200 ")
        program.interrupt()
        assert (await program.end())[::2] == (130, [])


async def test_a_shell_can_complete_what_is_typed():
    typed = {"COMP_WORDS": "moondream-async det", "COMP_CWORD": "1"}
    typed["_MOONDREAM_ASYNC_COMPLETE"] = "complete_bash"
    status, output, _ = await run(**typed)
    assert (status, output.split()) == (0, ["detect"])
    _, _, errors = await run("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "Traceback" not in errors
