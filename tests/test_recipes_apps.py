"""The recipes for web applications, in their own servers; and an `EventSource` in a browser."""

import contextlib
import os
import shutil
import socket

import aiohttp
import anyio
import backends
import pytest
from browsers import PATIENCE_MS, chromium
from programs import RECIPES, needs
from test_recipes import program

import moondream_async as md

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # they import half of the world


@pytest.fixture(scope="module")
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module")
async def browser():
    async with chromium() as browser:
        yield browser


def free_port():
    """Return one that the system does not give to others while an application starts."""
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    pytest.fail("no port is free")


# At each start Gradio writes a stub of each of its components, which takes seconds of a processor;
# and it asks itself for its page, and ends when it has none within three seconds.
GRADIO = """
import inspect
getfile = inspect.getfile
def of_others(value):
    if getattr(value, "__module__", "").startswith("gradio."):
        raise OSError
    return getfile(value)
inspect.getfile = of_others
import gradio.networking
inspect.getfile = getfile
gradio.networking.url_ok = lambda url: True
"""


@contextlib.asynccontextmanager
async def served(app, simulator, folder):
    """Serve a recipe; give the port."""
    port = free_port()
    environment = {
        "MOONDREAM_ENDPOINT": simulator.endpoint,
        "HOME": str(folder),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false",
    }
    recipe = shutil.copy(RECIPES / f"{app}_app.py", folder)
    command, kind = [recipe, port], "path"
    if app == "streamlit":
        command = ["streamlit", "run", "--server.headless=true", f"--server.port={port}", recipe]
        kind = "module"
    before = GRADIO if app == "gradio" else ""
    async with program(*command, before=before, kind=kind, **environment) as process:
        listening = False
        while not listening:
            if not process.runs:
                pytest.fail(str(await process.end()))
            with contextlib.suppress(OSError):
                async with await anyio.connect_tcp("127.0.0.1", port):
                    listening = True
            await anyio.sleep(0.05)  # nobody tells
        yield port


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
    async with served(app, simulator, tmp_path) as port:
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        await page.goto(f"http://127.0.0.1:{port}")
        chooser = page.locator("input[type=file]")
        await chooser.wait_for(state="attached")
        await chooser.set_input_files(md.SAMPLE_IMAGE)
        await see(page, "A red")
        held.release()
        await see(page, "A red circle.")
        other = shutil.copy(md.SAMPLE_IMAGE, tmp_path / "other.jpg")
        await chooser.set_input_files(other)
        await see(page, "word word")
        await end(page)
        await simulator.wait_until(lambda: simulator.requests[1].disconnected)
        await page.close()


@needs("gradio")
async def test_gradio_gives_the_answer_as_it_is_written_and_its_stop_button_ends_it(
    simulator, tmp_path, photo
):
    """Without its page, which alone would take a browser ten seconds of a processor."""
    simulator.script.caption(["A red", " circle."], hold_after=1)
    async with (
        served("gradio", simulator, tmp_path) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}/gradio_api/") as page,
    ):

        async def ask(method, path, **options):
            async with page.request(method, path, **options) as response:
                assert response.status == 200, await response.text()
                return await response.json()

        events = (await ask("GET", "/config"))["dependencies"]
        [number] = [each["id"] for each in events if each["api_name"] == "describe"]
        [stop_button] = [each for each in events if each["cancels"]]
        assert stop_button["targets"][0][1] == "click"
        assert stop_button["cancels"] == [number]
        with photo.open("rb") as file:
            [path] = await ask("POST", "upload", data={"files": file})
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        call = {"session_hash": "a-page", "fn_index": number}
        event = await ask("POST", "queue/join", json=call | {"data": [picture]})
        async with page.get("queue/data", params={"session_hash": "a-page"}) as response:
            async for line in response.content:
                if b"A red" in line:
                    break
            await ask("POST", "cancel", json=call | event)
            await simulator.wait_until(lambda: simulator.requests[0].disconnected)


# -- a stream of events -------------------------------------------------------------------

LISTEN = """question => new Promise(resolve => {
    const seen = [];
    const source = window.source = new EventSource("/ask?question=" + question);
    const note = name => event => {
        seen.push([name, event.data ? JSON.parse(event.data) : null]);
        if (name === "done" || name === "error") { source.close(); resolve(seen); }
    };
    source.onopen = () => { seen.push("open"); if (question === "nothing") resolve(seen); };
    for (const name of ["chunk", "done", "error"]) source.addEventListener(name, note(name));
})"""


async def test_an_event_source_reads_it_and_its_tab_ends_it_by_closing(
    browser, simulator, tmp_path, monkeypatch, photo
):
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    script = simulator.script
    async with backends.running(backends.fastapi, backends.uvicorn) as address:
        tab = await browser.new_page()
        await tab.goto(f"{address}/docs-that-are-not-there")

        script.query(["A red", " circle."])
        opened, *chunks, (last, done) = await tab.evaluate(LISTEN, "whole")
        assert opened == "open"
        assert chunks == [["chunk", {"chunk": "A red"}], ["chunk", {"chunk": " circle."}]]
        assert last == "done"
        assert done["request_id"]

        script.query(["A red", " circle."], fault="drop=1")
        *_, (last, data) = await tab.evaluate(LISTEN, "broken")
        assert (last, data["error"]["type"]) == ("error", "StreamInterruptedError")

        script.query(["A red"], hold_after=0)
        assert await tab.evaluate(LISTEN, "nothing") == ["open"]  # though nothing has been said
        await tab.close()
        await simulator.wait_until(lambda: simulator.requests[2].disconnected)
