"""The recipe for Jupyter, in a real kernel.

Without `-W error`: what is between us and the kernel warns of its own matters.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from programs import RECIPES, needs, running
from test_recipes import until_streaming

pytestmark = [pytest.mark.slow, needs("ipykernel", "nbclient")]

COMMAND = [sys.executable, Path(__file__).with_name("run_notebook.py"), RECIPES / "notebook.ipynb"]


@pytest.fixture
def notebook(simulator, photo, tmp_path):
    """Runs the notebook beside a picture, with folders of its own."""
    shutil.copy(photo, tmp_path / "photo.jpg")
    folders = ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")
    environment = dict.fromkeys(folders, str(tmp_path))
    return running(*COMMAND, tmp_path, MOONDREAM_ENDPOINT=simulator.endpoint, **environment)


def printed_and_errors(said):
    cells = [json.loads(line) for line in said.splitlines()]
    printed = "".join(each["printed"] for each in cells)
    return printed, [error for each in cells for error in each["errors"]]


async def test_notebook_prints_the_whole_answer(notebook, simulator, client, photo):
    answer = (await client.caption(photo)).caption
    async with notebook as program:
        status, said, _ = await program.end()

    assert (status, *printed_and_errors(said)) == (0, answer, [])
    await simulator.wait_until(lambda: simulator.connections.open == 1)  # that of this test


async def test_interrupted_cell_closes_its_connection_and_the_next_ones_run(
    notebook, simulator, interruptible
):
    simulator.faults.append("stall=3")
    async with notebook as program:
        request = await until_streaming(simulator, program)
        await program.until(lambda said: said.count("\n") == 3)  # the cells before
        await program.tell("interrupt")
        await simulator.wait_until(lambda: request.disconnected)
        status, said, _ = await program.end()

    printed, errors = printed_and_errors(said)
    assert (status, errors) == (0, ["KeyboardInterrupt"])
    assert len(printed.split()) == 3
