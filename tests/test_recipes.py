"""The recipes for other event loops, run as their users would run them: in the terminal.

Each streams an answer whole, and is stopped in the middle: then the simulator must see the
connection close, and the program must end in good order, without a warning.
"""

import re
import runpy

import anyio
import pytest
from programs import RECIPES, STRICT, needs, running, running_in_terminal

PROGRAMS = [
    pytest.param([*STRICT, RECIPES / "anyio_scopes.py", "99"], id="anyio"),
    pytest.param([*STRICT, RECIPES / "uvloop_program.py"], id="uvloop", marks=needs("uvloop")),
    pytest.param(
        # trio-asyncio itself makes use of what Python 3.12 has deprecated.
        [*STRICT, "-W", "ignore::DeprecationWarning", RECIPES / "trio_bridge.py"],
        id="trio",
        marks=needs("trio_asyncio"),
    ),
    pytest.param(
        [*STRICT, "-m", "IPython", RECIPES / "ipython_session.ipy"],
        id="IPython",
        marks=[needs("IPython"), pytest.mark.slow],
    ),
]


@pytest.fixture
def environment(simulator, tmp_path):
    return {"MOONDREAM_ENDPOINT": simulator.endpoint, "IPYTHONDIR": str(tmp_path)}


@pytest.fixture
async def answer(client, photo):
    """What is to be written; asked for before the recipe is run."""
    return (await client.caption(photo)).caption


async def until_streaming(simulator, program=None):
    """Wait for the first pieces of a stream that stalls; return its request."""
    while True:
        for request in simulator.requests:
            if request.stream and request.events_sent:
                return request
        if program is not None and not program.runs:
            pytest.fail(str(await program.end()))
        await anyio.sleep(0.01)  # nobody tells


def recipe(name):
    return runpy.run_path(str(RECIPES / name))


@pytest.mark.parametrize("command", PROGRAMS)
async def test_recipe_writes_the_whole_answer(command, environment, answer, photo):
    async with running(*command, photo, **environment) as program:
        status, said, complaints = await program.end()

    assert (status, complaints) == (0, [])
    assert said.strip().removeprefix(f"{photo}: ") == answer


@pytest.mark.parametrize("command", PROGRAMS[:-1])  # IPython goes on, as below
async def test_recipe_that_is_interrupted_closes_its_connection(
    command, environment, simulator, photo, interruptible
):
    simulator.faults.append("stall=3")
    async with running(*command, photo, **environment) as program:
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
    async with running(
        *STRICT, RECIPES / "anyio_scopes.py", "1", photo, photo, **environment
    ) as program:
        status, said, complaints = await program.end()

    assert (status, complaints) == (0, [])
    assert said == f"{photo}: {first}{stop}\n" * 2
    streams = simulator.requests[asked:]
    await simulator.wait_until(lambda: all(each.disconnected for each in streams))


@needs("IPython")
@pytest.mark.slow
async def test_ipython_session_goes_on_after_an_interrupted_cell(
    environment, simulator, photo, interruptible
):
    simulator.faults.append("stall=3")
    command = [*STRICT, "-m", "IPython", "--simple-prompt", "-i"]
    async with running(*command, RECIPES / "ipython_session.ipy", photo, **environment) as program:
        request = await until_streaming(simulator, program)
        program.interrupt()
        await simulator.wait_until(lambda: request.disconnected)
        await program.tell("'still ' + f'here, {client.stats().open_streams} open'")
        await program.until("still here, 0 open")
        await program.tell("exit")
        status, _, complaints = await program.end()

    assert (status, complaints) == (0, [])


# -- Textual ------------------------------------------------------------------------------


@pytest.fixture
def app(monkeypatch, environment, photo):
    pytest.importorskip("textual", reason="needs: python -m pip install '.[loops]'")
    monkeypatch.setenv("MOONDREAM_ENDPOINT", environment["MOONDREAM_ENDPOINT"])
    return recipe("textual_app.py")["CaptionApp"](photo)


def shown(app):
    return str(app.query_one("#caption").content)


async def test_textual_app_shows_the_whole_answer_after_one_that_escape_stopped(
    app, simulator, answer
):
    simulator.faults.append("stall=3")
    async with app.run_test() as pilot:
        await pilot.press("enter")
        request = await until_streaming(simulator)
        await pilot.press("escape")
        await simulator.wait_until(lambda: request.disconnected)
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        assert shown(app) == answer


@needs("textual")
@pytest.mark.slow
async def test_textual_app_in_a_terminal_closes_its_connection(environment, simulator, photo):
    simulator.faults.append("stall=3")
    command = [*STRICT, RECIPES / "textual_app.py", photo]
    async with running_in_terminal(*command, **environment) as program:
        await program.until("Describe")
        program.press(b"\r")
        request = await until_streaming(simulator, program)
        await program.until("640")
        program.press(b"q")
        await simulator.wait_until(lambda: request.disconnected)
        status, said, _ = await program.end()

    assert status == 0
    assert "Warning" not in said
