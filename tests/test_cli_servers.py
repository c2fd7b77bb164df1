"""The commands that start a server: ``demo``, the first minute with the package, and ``serve``."""

import contextlib
import re
import shutil

import anyio
import pytest
from programs import run, running, running_in_terminal

import moondream_async as md
from moondream_async.cli import main
from moondream_async.simulator import DIALECTS, Simulator
from moondream_async.simulator.faults import EFFECTS

pytestmark = pytest.mark.slow  # most tests run the program

HALF = "\N{UPPER HALF BLOCK}"

# -- demo -------------------------------------------------------------------------------


def test_demo_needs_nothing_and_says_that_no_model_looks(
    command, moondream_simulator, photo, monkeypatch
):
    expected = command("caption", photo)[1]
    asked = len(moondream_simulator.requests)
    monkeypatch.delenv("MOONDREAM_ENDPOINT")
    status, output, errors = command("demo", "--rate", "0", TERM="xterm-256color")
    assert (status, output) == (0, expected)
    server, picture, request, *hints = filter(None, errors.splitlines())
    assert "No model is looking" in server
    assert "md.SAMPLE_IMAGE" in picture
    assert "pieces" in request
    assert [hint for hint in hints if "moondream-async demo --web" in hint]
    assert len(moondream_simulator.requests) == asked


def test_demo_asks_the_given_server_about_the_given_picture(command, moondream_simulator, tmp_path):
    (tmp_path / "grey.ppm").write_bytes(b"P6 2 1 255 " + bytes(6))
    status, output, errors = command("demo", "grey.ppm")
    assert status == 0
    assert "2\N{MULTIPLICATION SIGN}1" in output
    assert moondream_simulator.endpoint in errors
    assert "grey.ppm" in errors
    assert "No model" not in errors
    assert len(moondream_simulator.requests) == 1


def test_demo_names_a_picture_of_the_web_by_its_address(command, monkeypatch):
    async def fetch(address):
        return md.EncodedImage(md.SAMPLE_IMAGE.read_bytes(), "image/jpeg", 640, 480)

    monkeypatch.setattr("moondream_async.cli._session.fetch_image", fetch)
    status, _, errors = command("demo", "https://a.example/b.jpg", "--rate", "0")
    assert status == 0
    assert "Picture: https://a.example/b.jpg\n" in errors


async def test_demo_shows_the_picture_and_wraps_the_answer_at_words():
    async with running_in_terminal("moondream-async", "demo", "--rate", "0") as program:
        status, said, _ = await program.end()
    assert status == 0
    shown = said.replace("\r\n", "\n").split("\n")
    picture = [number for number, line in enumerate(shown) if HALF in line]
    assert len(picture) > 8
    assert all(line.count(HALF) <= 79 for line in shown)
    text = [line for line in shown[picture[-1] + 1 :] if "\x1b" not in line]
    async with Simulator() as simulator, md.MoondreamClient(endpoint=simulator.endpoint) as client:
        expected = (await client.caption(md.SAMPLE_IMAGE)).caption
    assert " ".join(filter(None, text)) == expected
    assert max(map(len, text)) < 80
    assert "demo --web" in said
    assert "demo PICTURE" in said


async def test_demo_streams_at_its_rate_without_colours_until_ctrl_c(interruptible):
    command = ("moondream-async", "demo", "--rate", "2")
    for environment in ({"TERM": "dumb"}, {"NO_COLOR": "1"}):
        async with running_in_terminal(*command, **environment) as program:
            await program.until("A bright")
            assert program.runs
            program.interrupt()
            status, said, _ = await program.end()
        assert status == 130
        assert "Traceback" not in said
        assert HALF not in said


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


# -- serve ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(*args):
    """Run ``serve`` on a free port; yields the program and its endpoint."""
    command = ("moondream-async", "serve", "--port", "0", "--rate", "0")
    async with running(*command, *args) as program:
        await program.until("-d @-\n")
        exported = re.search(r"^export MOONDREAM_ENDPOINT=(\S+)$", program.said, re.MULTILINE)
        yield program, exported[1]


async def test_serve_says_where_it_listens_and_what_comes_and_ends_with_ctrl_c(
    photo, interruptible
):
    async with serving("--dialect", "old") as (program, endpoint):
        assert not endpoint.endswith("/v1")
        status, output, _ = await run("caption", photo, MOONDREAM_ENDPOINT=endpoint)
        assert (status, output[:12]) == (0, "A bright 640")
        await program.until(" POST /caption 200 ")
        program.interrupt()
        assert await program.end() == (130, program.said, [])


def test_serve_offers_all_dialects_and_lists_all_faults(capsys):
    assert main(["serve", "--dialect", "none"]) == 2
    said = capsys.readouterr().err
    assert [each for each in DIALECTS if f"'{each}'" not in said] == []
    assert main(["serve", "--fault", "help"]) == 0
    listed = {re.match(r"\w+", line)[0] for line in capsys.readouterr().out.splitlines()}
    assert listed >= set(EFFECTS)


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
        await program.until(" POST /v1/caption 400 ")
        await client.caption(photo)
        with pytest.raises(md.AuthenticationError):
            await other.caption(photo)
        assert "0pen-sesame" not in program.said


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
