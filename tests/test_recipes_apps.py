"""The recipes for Gradio, Streamlit and NiceGUI, in their own servers and a real browser."""

import contextlib
import shutil
import socket
import sys

import anyio
import pytest
from browsers import PATIENCE_MS, chromium
from programs import RECIPES, needs, running

import moondream_async as md

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # they import half of the world


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def browser():
    async with chromium() as browser:
        yield browser


@contextlib.asynccontextmanager
async def opened(app, browser, simulator, folder):
    """Serve a recipe; give a browser's page of it, with a file chosen."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, arguments = [sys.executable], [str(port)]
    if app == "streamlit":
        command += ["-m", "streamlit", "run"]
        arguments = ["--server.headless=true", f"--server.port={port}"]
    environment = {
        "MOONDREAM_ENDPOINT": simulator.endpoint,
        "HOME": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    }
    clean = ["env", "-u", "PYTEST_CURRENT_TEST"]  # NiceGUI looks at that
    recipe = shutil.copy(RECIPES / f"{app}_app.py", folder)
    async with running(*clean, *command, recipe, *arguments, **environment):
        while True:
            with contextlib.suppress(OSError):
                async with await anyio.connect_tcp("127.0.0.1", port):
                    break
            await anyio.sleep(0.05)  # nobody tells
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(f"http://127.0.0.1:{port}")
        chooser = page.locator("input[type=file]")
        await chooser.wait_for(state="attached")
        await chooser.set_input_files(md.SAMPLE_IMAGE)
        yield page
        await page.close()


async def see(page, text):
    await page.get_by_text(text).first.wait_for()


async def stop(page):
    await page.get_by_text("Stop", exact=True).click()


async def leave(page):
    await page.close()


@pytest.mark.parametrize(
    ("app", "end"),
    [
        pytest.param("streamlit", stop, id="streamlit", marks=needs("streamlit")),
        pytest.param("nicegui", leave, id="nicegui", marks=needs("nicegui")),
    ],
)
async def test_app_shows_the_answer_while_it_is_written_and_who_leaves_ends_the_request(
    app, end, browser, simulator, tmp_path
):
    held = simulator.script.caption(["A red", " circle."], hold_after=1)
    simulator.script.caption(["word "] * 10_000)
    simulator.rate = 20
    async with opened(app, browser, simulator, tmp_path) as page:
        await see(page, "A red")
        held.release()
        await see(page, "A red circle.")
        other = shutil.copy(md.SAMPLE_IMAGE, tmp_path / "other.jpg")
        await page.locator("input[type=file]").set_input_files(other)
        await see(page, "word word")
        await end(page)
        await simulator.wait_until(lambda: simulator.requests[1].disconnected)


@needs("gradio")
async def test_gradio_shows_the_answer_as_it_is_written_and_its_stop_button_ends_it(
    browser, simulator, tmp_path
):
    simulator.script.caption(["A red", " circle."], hold_after=1)
    async with opened("gradio", browser, simulator, tmp_path) as page:
        await see(page, "A red")
        await page.get_by_role("button", name="Stop").click()
        await simulator.wait_until(lambda: simulator.requests[0].disconnected)
