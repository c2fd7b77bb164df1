"""The recipes with a window of Qt's, offscreen, in a process and an event loop of their own.

A timer in that loop clicks the buttons and tells what the window shows (`qt_driver`), so
that nothing would happen here while the window is stuck.
"""

import asyncio
import json
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import pytest
from programs import RECIPES, STRICT, needs, running
from raw_server import DONE, EVENTS, STREAM_HEAD, TEXT, WORDS, RawServer, in_chunks

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).with_name("qt_driver.py")


@cache
def complaint_of_qt():
    """What Qt misses of the system's; asked in a process of its own, as it changes `import`."""
    done = subprocess.run(
        [sys.executable, "-c", "import PySide6.QtWidgets"],
        capture_output=True,
        check=False,
        text=True,
    )
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


@pytest.fixture(
    params=[
        pytest.param("qasync_window.py", id="qasync", marks=needs("qasync", "PySide6")),
        pytest.param("qt_asyncio_window.py", id="QtAsyncio", marks=needs("PySide6.QtAsyncio")),
    ]
)
def window(request, photo, tmp_path):
    """Opens the recipe's window, with a picture to ask a server about."""
    complaint = complaint_of_qt()
    if complaint:
        pytest.skip(
            f"needs: {complaint} (apt-get install libegl1 libgl1 libxkbcommon0 libdbus-1-3 "
            "libfontconfig1 libglib2.0-0)"
        )

    @asynccontextmanager
    async def opened(endpoint):
        environment = {
            "MOONDREAM_ENDPOINT": endpoint,
            "QT_QPA_PLATFORM": "offscreen",
            "XDG_RUNTIME_DIR": str(tmp_path),
        }
        recipe = RECIPES / request.param
        async with running(*STRICT, DRIVER, recipe, photo, **environment) as program:
            window = Window(program)
            await window.until(lambda _, enabled: enabled == ["Describe"])
            yield window

    return opened


class Window:
    def __init__(self, program):
        self.program = program

    async def until(self, condition):
        """Wait until the window shows, or has shown, a text with buttons of which that is true."""

        def holds(said):
            shown = [
                json.loads(line) for line in said.splitlines(keepends=True) if line[-1] == "\n"
            ]
            return any(condition(each["text"], each["enabled"]) for each in shown)

        await self.program.until(holds)

    async def end(self):
        status, _, complaints = await self.program.end()
        return status, complaints


async def test_window_shows_the_whole_answer_after_a_cancelled_one_and_closes_its_connection(
    window, simulator, client, photo
):
    answer = (await client.caption(photo)).caption
    async with window(simulator.endpoint) as shown:

        async def leave(how):
            await shown.program.tell(how)
            await simulator.wait_until(lambda: simulator.requests[-1].disconnected)

        simulator.faults.append("stall=3")
        await shown.program.tell("click Describe")
        await shown.until(lambda text, enabled: len(text.split()) == 3 and enabled == ["Cancel"])
        await leave("click Cancel")
        await shown.until(lambda text, enabled: text and enabled == ["Describe"])
        await shown.program.tell("click Describe")
        await shown.until(lambda text, enabled: (text, enabled) == (answer, ["Describe"]))
        simulator.faults.append("stall=3")
        await shown.program.tell("click Describe")
        await simulator.wait_until(lambda: [r.events_sent for r in simulator.requests[3:]] == [3])
        await leave("close")

        assert await shown.end() == (0, [])


async def test_window_is_alive_between_any_two_pieces(window):
    """The server sends a piece when the window, in a timer, has told of the one before."""
    pieces = [asyncio.Event() for _ in WORDS]

    async def play(peer):
        await peer.request()
        await peer.send(STREAM_HEAD)
        for event, told in zip(EVENTS, pieces, strict=True):
            await peer.send(in_chunks(event, end=False))
            await told.wait()
        await peer.send(in_chunks(DONE))
        await peer.until_gone()

    async with RawServer(play) as server, window(server.endpoint) as shown:
        await shown.program.tell("click Describe")
        for number, told in enumerate(pieces, start=1):
            so_far = "".join(WORDS[:number])
            await shown.until(lambda text, _, so_far=so_far: text == so_far)
            told.set()
        await shown.until(lambda text, enabled: (text, enabled) == (TEXT, ["Describe"]))
        await shown.program.tell("close")

        assert await shown.end() == (0, [])
