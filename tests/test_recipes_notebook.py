"""The recipe for Jupyter, in a real kernel.

Without `-W error`: what is between us and the kernel warns of its own matters.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from programs import RECIPES, needs, running

pytestmark = [pytest.mark.slow, needs("ipykernel", "nbclient")]

COMMAND = [sys.executable, Path(__file__).with_name("run_notebook.py"), RECIPES / "notebook.ipynb"]


@pytest.fixture
def notebook(simulator, photo, tmp_path):
    """Runs the notebook beside a picture, with folders of its own."""
    shutil.copy(photo, tmp_path / "photo.jpg")
    folders = ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    environment = dict.fromkeys(folders, str(tmp_path))
    return running(*COMMAND, tmp_path, MOONDREAM_ENDPOINT=simulator.endpoint, **environment)


async def test_notebook_prints_the_whole_answer_and_goes_on_after_an_interrupted_cell(
    notebook, simulator, client, photo, interruptible
):
    answer = (await client.caption(photo)).caption
    simulator.faults.extend(["slow_start=0", "stall=3"])
    async with notebook as program:
        await program.until(lambda said: said.count("\n") == 4)  # the cells before
        await simulator.wait_until(lambda: [r.events_sent for r in simulator.requests[2:]] == [3])
        await program.tell("interrupt")
        await simulator.wait_until(lambda: simulator.requests[2].disconnected)
        status, said, _ = await program.end()

    cells = [json.loads(line) for line in said.splitlines()]
    assert status == 0
    assert [each["printed"] for each in cells[:4]] == ["", "", "", answer]
    assert answer.startswith(cells[4]["printed"])
    assert [each["errors"] for each in cells] == [[]] * 4 + [["KeyboardInterrupt"], []]
    await client.aclose()
    await simulator.wait_until(lambda: simulator.connections.open == 0)
