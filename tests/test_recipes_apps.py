"""The recipes for Gradio, Streamlit and NiceGUI, in their own servers and a real browser."""

import contextlib
import shutil
import socket
import sys

import anyio
import pytest
from programs import RECIPES, needs, running
from test_web_page import BROWSERS, PATIENCE_MS

import moondream_async as md

playwright = pytest.importorskip(
    "playwright.async_api", reason="needs: python -m pip install '.[browser]'"
)
expect = playwright.expect
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # they import half of the world

STREAMLIT = ("streamlit", ["run", "streamlit_app.py", "--server.headless=true"], "--server.port={}")
GRADIO = ("gradio", ["gradio_app.py"], "{}")
NICEGUI = ("nicegui", ["nicegui_app.py"], "{}")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@contextlib.asynccontextmanager
async def opened(recipe, simulator, folder):
    """Serve a recipe; give a browser's page of it, with a file chosen."""
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("needs a browser: apt-get install chromium")
    package, [*command], option = recipe
    port = free_port()
    shutil.copy(RECIPES / f"{package}_app.py", folder)
    start = ["env", "-u", "PYTEST_CURRENT_TEST", sys.executable]  # NiceGUI looks at that
    if package == "streamlit":
        start += ["-m", package]
    environment = {
        "MOONDREAM_ENDPOINT": simulator.endpoint,
        "HOME": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    }
    paths = [str(folder / each) if each.endswith(".py") else each for each in command]
    async with (
        running(*start, *paths, option.format(port), **environment),
        playwright.async_playwright() as driver,
    ):
        while True:
            with contextlib.suppress(OSError):
                async with await anyio.connect_tcp("127.0.0.1", port):
                    break
            await anyio.sleep(0.05)  # nobody tells
        browser = await driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{port}")
        chooser = page.locator("input[type=file]")
        await chooser.wait_for(state="attached")
        await chooser.set_input_files(md.SAMPLE_IMAGE)
        yield page
        await browser.close()


async def stop(page):
    await page.get_by_text("Stop", exact=True).click()


async def leave(page):
    await page.close()


@pytest.mark.parametrize(
    ("recipe", "end"),
    [
        pytest.param(STREAMLIT, stop, id="streamlit", marks=needs("streamlit")),
        pytest.param(NICEGUI, leave, id="nicegui", marks=needs("nicegui")),
    ],
)
async def test_app_shows_the_answer_while_it_is_written_and_who_leaves_ends_the_request(
    recipe, end, simulator, tmp_path
):
    held = simulator.script.caption(["A red", " circle."], hold_after=1)
    simulator.script.caption(["word "] * 10_000)
    simulator.rate = 20
    async with opened(recipe, simulator, tmp_path) as page:
        await expect(page.get_by_text("A red")).to_be_visible(timeout=PATIENCE_MS)
        held.release()
        await expect(page.get_by_text("A red circle.")).to_be_visible(timeout=PATIENCE_MS)
        other = shutil.copy(md.SAMPLE_IMAGE, tmp_path / "other.jpg")
        await page.locator("input[type=file]").set_input_files(other)
        await expect(page.get_by_text("word word").first).to_be_visible(timeout=PATIENCE_MS)
        await end(page)
        await simulator.wait_until(lambda: simulator.requests[1].disconnected)


@needs("gradio")
async def test_gradio_shows_the_answer_while_it_is_written_and_its_stop_button_ends_it(
    simulator, tmp_path
):
    simulator.script.caption(["A red", " circle."], hold_after=1)
    async with opened(GRADIO, simulator, tmp_path) as page:
        await expect(page.get_by_text("A red")).to_be_visible(timeout=PATIENCE_MS)
        await page.get_by_role("button", name="Stop").click()
        await simulator.wait_until(lambda: simulator.requests[0].disconnected)
