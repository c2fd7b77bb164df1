"""The recipes, run as their users would run them: in a terminal, a window, a notebook, a call.

Each streams an answer whole, and is stopped in the middle: then the simulator must see the
connection close, and the program must end in good order, without a warning.
"""

import json
import re
import runpy
import shutil
import sys
from ctypes.util import find_library
from pathlib import Path

import anyio
import pytest
from programs import RECIPES, STRICT, needs, running

# Forked: a fresh interpreter takes a second of a processor to import what a program needs.
MAIN = """
import os, runpy, sys, warnings
os.environ.pop("PYTEST_CURRENT_TEST")  # NiceGUI looks at that
{before}
sys.argv = sys.argv[1:]
runpy.run_{kind}(sys.argv[0], run_name="__main__")
"""


STRICTLY = 'os.environ["PYTHONASYNCIODEBUG"] = "1"; warnings.simplefilter("error")'


def program(*command, before=STRICTLY, kind="path", **environment):
    """Run a recipe, or a module."""
    script = MAIN.format(before=before, kind=kind)
    return running("moondream-async", "-c", script, *command, **environment)


def fresh(*command, **environment):
    """Run a recipe whose imports must be the first: trio-asyncio's, which patches asyncio.

    It makes use of what Python 3.12 has deprecated.
    """
    return running(*STRICT, "-W", "ignore::DeprecationWarning", *command, **environment)


@pytest.fixture
def environment(simulator, tmp_path):
    return {"MOONDREAM_ENDPOINT": simulator.endpoint, "IPYTHONDIR": str(tmp_path)}


@pytest.fixture
async def answer(client, photo):
    """What is to be written; asked for before the recipe is run."""
    return (await client.caption(photo)).caption


async def until_streaming(simulator, program=None, number=0):
    """Wait for the first pieces of a stream that stalls; return its request, the n-th from 0."""
    while True:
        for request in simulator.requests[number:]:
            if request.stream and request.events_sent:
                return request
        if program is not None and not program.runs:
            pytest.fail(str(await program.end()))
        await anyio.sleep(0.01)  # nobody tells


# -- the terminal -------------------------------------------------------------------------

PROGRAMS = [
    pytest.param(program, ["anyio_scopes.py", "99"], id="anyio"),
    pytest.param(program, ["uvloop_program.py"], id="uvloop", marks=needs("uvloop")),
    pytest.param(fresh, ["trio_bridge.py"], id="trio", marks=needs("trio_asyncio")),
]


@pytest.fixture
def recipe(run, command, photo, environment):
    name, *arguments = command
    return run(RECIPES / name, *arguments, photo, **environment)


@pytest.mark.parametrize(("run", "command"), PROGRAMS)
async def test_recipe_writes_the_whole_answer(answer, photo, recipe):
    async with recipe as program:
        status, said, complaints = await program.end()

    assert (status, complaints) == (0, [])
    assert said.strip().removeprefix(f"{photo}: ") == answer


@pytest.mark.parametrize(("run", "command"), PROGRAMS)
async def test_recipe_that_is_interrupted_closes_its_connection(interruptible, simulator, recipe):
    simulator.faults.append("stall=3")
    async with recipe as program:
        request = await until_streaming(simulator, program)
        program.interrupt()
        await simulator.wait_until(lambda: request.disconnected)
        status, _, complaints = await program.end()

    assert status in {0, 130}
    assert complaints == []


async def test_anyio_scope_closes_the_streams_that_have_written_enough(
    environment, simulator, answer, photo
):
    first, stop, _ = answer.partition(".")
    simulator.faults.append(f"stall={len(re.findall('[^ ]+', first))},times=2")
    asked = len(simulator.requests)
    async with program(RECIPES / "anyio_scopes.py", "1", photo, photo, **environment) as recipe:
        status, said, complaints = await recipe.end()

    assert (status, complaints) == (0, [])
    assert said == f"{photo}: {first}{stop}\n" * 2
    streams = simulator.requests[asked:]
    await simulator.wait_until(lambda: all(each.disconnected for each in streams))


@needs("IPython")
@pytest.mark.slow
async def test_ipython_goes_on_after_an_interrupted_cell(
    interruptible, environment, simulator, answer, photo
):
    simulator.faults.append("stall=3")
    recipe = RECIPES / "ipython_session.ipy"
    command = ["IPython", "--simple-prompt", "-i", recipe, photo]
    async with program(*command, kind="module", **environment) as session:
        request = await until_streaming(simulator, session)
        session.interrupt()
        await simulator.wait_until(lambda: request.disconnected)
        await session.tell("'still ' + f'here, {client.stats().open_streams} open'")
        await session.until("still here, 0 open")
        await session.tell("await client.aclose(); sys.argv[1] = sys.argv[-1]")
        await session.tell(f"%run {recipe}")
        await session.until(answer)
        await session.tell("exit")
        status, _, complaints = await session.end()

    assert (status, complaints) == (0, [])


@needs("textual")
@pytest.mark.slow
async def test_textual_app_shows_the_whole_answer_between_two_that_its_keys_stopped(
    simulator, answer, photo, monkeypatch, silence
):
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    app = runpy.run_path(str(RECIPES / "textual_app.py"))["CaptionApp"](photo)
    async with app.run_test() as pilot:
        simulator.faults.append("stall=3")
        await pilot.press("enter")
        request = await until_streaming(simulator)
        await pilot.press("escape")
        await simulator.wait_until(lambda: request.disconnected)
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        assert str(app.query_one("#caption").content) == answer
        simulator.faults.append("stall=3")
        await pilot.press("enter")
        request = await until_streaming(simulator, number=3)
        await pilot.press("q")
        await simulator.wait_until(lambda: request.disconnected)


# -- Qt's windows, offscreen --------------------------------------------------------------

LIBRARIES = {
    "EGL": "libegl1",
    "GL": "libgl1",
    "xkbcommon": "libxkbcommon0",
    "dbus-1": "libdbus-1-3",
    "fontconfig": "libfontconfig1",
    "glib-2.0": "libglib2.0-0",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("qasync_window.py", id="qasync", marks=needs("qasync", "PySide6")),
        pytest.param("qt_asyncio_window.py", id="QtAsyncio", marks=needs("PySide6.QtAsyncio")),
    ],
)
async def test_window_is_alive_between_two_pieces_and_what_ends_an_answer_closes_its_connection(
    name, environment, simulator, photo, tmp_path
):
    """A timer in its event loop clicks the buttons and tells what the window shows."""
    missing = [package for name, package in LIBRARIES.items() if find_library(name) is None]
    if missing:
        pytest.skip(f"needs: apt-get install {' '.join(missing)}")
    environment |= {"QT_QPA_PLATFORM": "offscreen", "XDG_RUNTIME_DIR": str(tmp_path)}
    driver = Path(__file__).with_name("qt_driver.py")
    held = simulator.script.caption(["A red", " circle."], hold_after=1)
    async with program(driver, RECIPES / name, photo, **environment) as window:

        async def order(what, then):
            seen = len(window.said)
            await window.tell(what)
            await window.until(then, after=seen)

        await window.until('"enabled": ["Describe"]')
        await order("click Describe", '{"text": "A red", "enabled": ["Cancel"]}')
        held.release()
        await window.until('{"text": "A red circle.", "enabled": ["Describe"]}')
        simulator.faults.extend(["stall=3"] * 2)
        ends = {"click Cancel": '"enabled": ["Describe"]', "close": ""}
        for number, (how, then) in enumerate(ends.items(), start=1):
            await order("click Describe", '"enabled": ["Cancel"]')
            request = await until_streaming(simulator, window, number)
            await order(how, then)
            await simulator.wait_until(lambda request=request: request.disconnected)

        assert (await window.end())[::2] == (0, [])


# -- a notebook, in a real kernel ---------------------------------------------------------


@pytest.mark.slow
@needs("ipykernel", "nbclient")
@pytest.mark.usefixtures("interruptible")
async def test_notebook_prints_the_whole_answer_and_goes_on_after_an_interrupted_cell(
    simulator, client, answer, photo, tmp_path
):
    """Without `-W error`: what is between us and the kernel warns of its own matters."""
    shutil.copy(photo, tmp_path / "photo.jpg")
    folders = ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    environment = dict.fromkeys(folders, str(tmp_path)) | {"MOONDREAM_ENDPOINT": simulator.endpoint}
    runner = Path(__file__).with_name("run_notebook.py")
    simulator.faults.extend(["slow_start=0", "stall=3"])
    async with running(
        sys.executable, runner, RECIPES / "notebook.ipynb", tmp_path, **environment
    ) as notebook:
        await notebook.until(lambda said: said.count("\n") == 4)  # the cells before
        request = await until_streaming(simulator, notebook, number=2)
        await notebook.tell("interrupt")
        await simulator.wait_until(lambda: request.disconnected)
        status, said, _ = await notebook.end()

    cells = [json.loads(line) for line in said.splitlines()]
    assert status == 0
    assert [each["printed"] for each in cells[:4]] == ["", "", "", answer]
    assert answer.startswith(cells[4]["printed"])
    assert [each["errors"] for each in cells] == [[]] * 4 + [["KeyboardInterrupt"], []]
    await client.aclose()
    await simulator.wait_until(lambda: simulator.connections.open == 0)


# -- moving pictures ----------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip("av", reason="the extra video is not installed")
    from pictures_moving import make_clip

    return make_clip(tmp_path / "clip.mp4", count=12)


@needs("cv2")
async def test_what_opencv_captures_is_watched_to_its_last_frame(environment, clip):
    async with program(RECIPES / "opencv_camera.py", clip, "red", **environment) as recipe:
        status, said, complaints = await recipe.end()

    assert (status, complaints) == (0, [])
    assert said.splitlines()[-1].startswith("frame 11, ")


@needs("aiortc")
async def test_the_other_sides_video_in_a_webrtc_call_is_watched(
    simulator, clip, monkeypatch, capsys
):
    from aioice.ice import get_host_addresses

    if not get_host_addresses(use_ipv4=True, use_ipv6=True):
        pytest.skip("this machine has no address but 127.0.0.1, which WebRTC does not use")
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    recipe = runpy.run_path(str(RECIPES / "aiortc_call.py"))
    await recipe["main"](str(clip), "red")
    found = re.findall(r"([.0-9]+) s, [.0-9]+ s old: \[", capsys.readouterr().out)
    times = [float(each) for each in found]
    assert times
    assert times == sorted(times)
    assert len(simulator.requests) >= len(times)
