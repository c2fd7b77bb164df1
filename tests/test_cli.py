"""The program: how it starts, what it refuses, and how it speaks of errors.

What commands print about pictures is in `test_cli_answers`, `demo` and `serve` are in
`test_cli_servers`, `watch` is in `test_cli_watch`, and ``bulk`` in `test_bulk_cli`. Whatever
needs a terminal, Ctrl-C or a stream that closes is in `test_cli_terminal`.
"""

import importlib.metadata
import importlib.util
import os
import re
import socket
import subprocess
import sys
from contextlib import closing

import anyio
import pytest
from canned import canned
from commands import is_one_line
from programs import PROGRAM
from raw_server import whole

import moondream_async as md
from moondream_async.cli import main
from moondream_async.simulator import Simulator, SimulatorThread

# -- starting ---------------------------------------------------------------------------


async def test_without_its_extra_it_says_what_to_install(tmp_path):
    for name in ("moondream_async", "msgspec"):  # a site directory with no more than these
        (found,) = importlib.util.find_spec(name).submodule_search_locations
        (tmp_path / name).symlink_to(found)
    program = [sys.executable, "-S", "-m", "moondream_async", "demo"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = await anyio.run_process(program, env=env, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
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
def test_without_arguments_it_prints_its_help_and_when_asked_its_version(command):
    status, output, errors = command()
    assert (status, errors) == (0, "")
    assert output == command("--help")[1]
    assert re.search(r"^  demo ", output, re.MULTILINE)
    assert command("--version") == (0, f"moondream-async {md.__version__}\n", "")


@pytest.mark.slow
def test_a_shell_can_complete_what_is_typed(command, capsys):
    typed = {"COMP_WORDS": "moondream-async det", "COMP_CWORD": "1"}
    with pytest.raises(SystemExit) as ended:
        command(**typed, _MOONDREAM_ASYNC_COMPLETE="complete_bash")
    assert (ended.value.code, capsys.readouterr().out.split()) == (0, ["detect"])
    unknown = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "Traceback" not in command("--show-completion", **unknown)[2]


def test_ctrl_c_while_it_loads_ends_it_without_a_word(tmp_path):
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(PROGRAM, check=False, capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


# -- wrong usage ------------------------------------------------------------------------


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
        ("caption photo.jpg --timeout inf", "'--timeout': inf is not"),
        ("query photo.jpg", "QUESTION"),
        ("query photo.jpg Why? --no-image", "--no-image"),
        ("segment photo.jpg", "OBJECT"),
        ("batch", "Missing command"),
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
        ("demo --no-open", "'--web'"),
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("called", "on_path", "typed"),
    [
        (".venv/bin/moondream-async", False, ".venv/bin/moondream-async"),
        (".venv/bin/moondream-async", True, "moondream-async"),
        ("moondream_async/__main__.py", False, "moondream-async"),
    ],
)
def test_who_names_several_pictures_is_told_what_to_type(
    command, tmp_path, monkeypatch, *, called, on_path, typed
):
    program = tmp_path / ".venv/bin/moondream-async"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.setattr(sys, "argv", [called])
    path = str(program.parent) if on_path else ""
    for args in (["caption", "a.jpg", "b.jpg"], ["detect", "a.jpg", "cat", "b.jpg"]):
        status, _, errors = command(*args, PATH=path)
        assert status == 2
        assert is_one_line(errors)
        assert f"there is: {typed} bulk PATHS..." in errors


# -- errors, in the command line's own words ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "says", "not_says"),
    [
        ("caption {photo}", "MOONDREAM_API_KEY", "api_key="),
        ("caption {photo}", "--endpoint", "endpoint="),
        ("caption {photo} --endpoint nowhere", "--endpoint, or MOONDREAM_ENDPOINT", "endpoint "),
        ("query {photo} _ --endpoint {nobody}", "QUESTION must not be empty", "question must"),
        ("detect {photo} _ --endpoint {nobody}", "OBJECT must not be empty", "object must"),
        ("caption {photo} --model _ --endpoint {nobody}", "--model must not be empty", "'"),
        ("caption http://127.0.0.1/x.jpg --endpoint {nobody}", "not on the public inte", "Errno"),
        ("caption ~/none.jpg --endpoint {nobody}", "{home}/none.jpg", "~"),
        (
            "caption {photo} --endpoint {silent} --timeout 0.05",
            "0.05 seconds (--timeout)",
            "Timeout.",
        ),
        (
            "HTTPS_PROXY=SOCKS5://A caption {photo} --endpoint https://a.example",
            "not 'SOCKS5://A'. Unset it to use none.",
            "False",
        ),
        ("MOONDREAM_API_KEY=a\nb demo", "MOONDREAM_API_KEY must be", "api_key"),
        ("watch {camera} --endpoint {nobody}", "Could not connect to {camera}", "serve"),
        ("caption {photo} --endpoint {plain}", "[SSL", "serve"),
        ("caption - --endpoint {nobody}", "is empty", "Traceback"),
        ("serve --port {port}", "127.0.0.1:{port}", "Errno"),
    ],
)
def test_errors_are_one_line_and_speak_of_options_and_variables(
    args, says, not_says, photo, *, capfd, tmp_path, nobody, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    with closing(socket.create_server(("127.0.0.1", 0))) as silent, SimulatorThread() as simulator:
        port = silent.getsockname()[1]
        names = {"photo": photo, "port": port, "home": tmp_path, "nobody": nobody}
        names["camera"] = nobody.removesuffix("/v1")
        names["silent"] = f"http://127.0.0.1:{port}/v1"
        names["plain"] = simulator.endpoint.replace("http:", "https:")
        given = [each.format(**names) if each != "_" else "" for each in args.split(" ")]
        if given[0][0].isupper():
            monkeypatch.setenv(*given.pop(0).split("="))
        assert main(given) == 1
    output, errors = capfd.readouterr()
    assert output == ""
    assert is_one_line(errors)
    assert says.format(**names) in errors
    assert not_says not in errors.removeprefix("moondream-async: ").replace("MOONDREAM_", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ("status=400", "Simulated error 400"),
        ("html=400", "Error 400"),
        ("error_event=0", "Inference failed"),
        ("stall=0", "0.5 seconds"),
    ],
)
def test_an_error_of_the_server_is_one_line(command, moondream_simulator, photo, fault, hint):
    moondream_simulator.faults.append(f"{fault},times=always")
    limit = ["--timeout", "0.5"] * (fault == "stall=0")
    status, output, errors = command("caption", photo, *limit)
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert hint in errors


@pytest.mark.slow
def test_no_key_is_ever_shown(command, photo):
    with SimulatorThread(Simulator(api_key="right")) as simulator:
        keys = {"MOONDREAM_ENDPOINT": simulator.endpoint, "MOONDREAM_API_KEY": "wr0ng-key"}
        status, output, errors = command("caption", photo, **keys)
    assert (status, output) == (1, "")
    assert is_one_line(errors)
    assert "wr0ng-key" not in errors


@pytest.mark.slow
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


@pytest.mark.slow
def test_verbose_writes_a_line_for_what_the_client_does_wherever_it_stands(command, photo):
    for args in (
        ["-v", "caption", photo],
        ["caption", photo, "-v"],
        ["caption", "--verbose", photo],
    ):
        status, said, errors = command(*args)
        assert status == 0
        assert said.startswith("A bright")
        assert any("POST /caption" in line and "200" in line for line in errors.splitlines())
    assert command("caption", photo)[2] == ""
