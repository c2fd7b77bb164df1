"""The recipe for production, under a real uvicorn, behind a real nginx, and in a real browser."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import aiohttp
import anyio
import pytest
from browsers import chromium
from programs import RECIPES, running

from moondream_async._protocol.sse import SSEParser

pytest.importorskip("uvicorn", reason="needs: python -m pip install '.[foreign]'")
pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
ADDRESS = re.compile(r"running on (http://[\d.:]+|unix)")
BROWSERS_AT_ONCE = 20


@contextlib.asynccontextmanager
async def serving(simulator, *options):
    """Run the recipe in a process of its own; give the process, and its address."""
    async with running(
        *(sys.executable, "-W", "error", "-m", "uvicorn", "production:app"),
        *("--app-dir", RECIPES, "--no-access-log", *options),
        stderr=subprocess.STDOUT,
        MOONDREAM_ENDPOINT=simulator.endpoint,
    ) as backend:
        await backend.until(ADDRESS.search)
        yield backend, ADDRESS.search(backend.said)[1]


@pytest.fixture
async def backend(simulator):
    async with serving(simulator, "--port", 0) as backend:
        yield backend


@pytest.fixture
async def browser(backend):
    async with aiohttp.ClientSession(backend[1]) as browser:
        yield browser


async def ends_of(browser, photo, reading):
    """Read events to the end; return the name of the last."""
    parser = SSEParser()
    names = []
    async with browser.post("/describe", data=photo.read_bytes()) as response:
        async for data in response.content.iter_any():
            names += [event.event for event in parser.feed(data)]
            if "chunk" in names:
                reading.release()
    return names[-1]


async def test_browsers_are_told_the_end_when_the_backend_is_stopped(backend, simulator, photo):
    completed = BROWSERS_AT_ONCE // 2
    held = [
        simulator.script.caption(["A red", " circle."], hold_after=1)
        for _ in range(BROWSERS_AT_ONCE)
    ]
    reading = asyncio.Semaphore(0)
    program, address = backend
    async with aiohttp.ClientSession(address) as browser:
        ends = [
            asyncio.create_task(ends_of(browser, photo, reading)) for _ in range(BROWSERS_AT_ONCE)
        ]
        for _ in range(BROWSERS_AT_ONCE):
            await reading.acquire()
        os.kill(program.pid, signal.SIGTERM)  # as a deployment does
        await program.until("Shutting down")
        for answer in held[:completed]:
            answer.release()
        names = await asyncio.gather(*ends)
        status, log, _ = await program.end()

    assert sorted(names) == ["done"] * completed + ["error"] * (BROWSERS_AT_ONCE - completed)
    assert status == -signal.SIGTERM  # which uvicorn raises again when it is done
    assert [line for line in log.splitlines() if not line.startswith("INFO")] == []


async def test_each_failure_has_a_status_of_the_backends_own_and_sockets_give_pieces(
    browser, simulator, photo
):
    async def answer_to(body, *faults):
        simulator.faults.extend(faults)
        async with browser.post("/describe", data=body) as response:
            assert (await response.json())["error"]
            return response.status, response.headers.get("Retry-After")

    picture = photo.read_bytes()
    assert await answer_to(b"no picture") == (415, None)
    assert await answer_to(picture, "status=400") == (502, None)
    assert await answer_to(picture, "status=401") == (502, None)
    assert await answer_to(picture, "status=429,times=always,retry_after=0.2") == (429, "1")

    simulator.faults.clear()
    simulator.script.caption(["A red", " circle."])
    async with browser.ws_connect("/ws") as socket:
        await socket.send_bytes(photo.read_bytes())
        simulator.faults.extend(["slow_start=0", "status=401"])
        await socket.send_bytes(photo.read_bytes())  # which waits for its turn
        said = [await socket.receive_json() for _ in range(3)]
        failed = await socket.receive_json()
        simulator.script.caption(["A red", " circle."], hold_after=1)
        await socket.send_bytes(photo.read_bytes())
        assert await socket.receive_json() == {"chunk": "A red"}
    await simulator.wait_until(lambda: simulator.requests[-1].disconnected)

    assert said == [{"chunk": "A red"}, {"chunk": " circle."}, {"done": True}]
    assert "error" in failed


# -- nginx ---------------------------------------------------------------------------------


@pytest.fixture
async def front(simulator, tmp_path, monkeypatch):
    """A browser's session with nginx, which has the backend behind it."""
    if NGINX is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    monkeypatch.chdir(tmp_path)
    shutil.copy(RECIPES / "nginx.conf", tmp_path)
    options = f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/error.log;"
    if os.getuid() == 0:
        options += " user root;"  # or its workers could not reach into the folder of the test
    command = [NGINX, "-p", tmp_path, "-c", "nginx.conf", "-g", options]
    async with (
        serving(simulator, "--uds", "backend.sock"),
        running(*command),
        aiohttp.ClientSession(
            "http://localhost",
            connector=aiohttp.UnixConnector("front.sock"),
            headers={"Accept-Encoding": "gzip"},
        ) as browser,
    ):
        while True:  # it is there before it listens
            with contextlib.suppress(OSError):
                await (await anyio.connect_unix("front.sock")).aclose()
                break
            await asyncio.sleep(0.01)  # nobody tells
        yield browser


async def test_pieces_and_leaving_and_sockets_go_through_nginx(front, simulator, photo):
    picture = photo.read_bytes()
    for path in ("/describe", "/text"):
        held = simulator.script.caption(["A red", " circle."], hold_after=1)
        said = b""
        async with front.post(path, data=picture) as response:
            assert response.status == 200
            while b"A red" not in said:
                part = await response.content.readany()
                assert part, said
                said += part
            assert b"circle" not in said
            held.release()
            said += await response.read()
        assert response.headers["Content-Encoding"] == "gzip"
        assert b"circle." in said

    simulator.script.caption(["A red", " circle."], hold_after=1)
    async with front.post("/text", data=picture) as response:
        await response.content.readany()
        response.close()
    await simulator.wait_until(lambda: simulator.requests[-1].disconnected)

    simulator.script.caption(["A red", " circle."])
    async with front.ws_connect("/ws") as socket:
        await socket.send_bytes(picture)
        assert await socket.receive_json() == {"chunk": "A red"}


# -- a browser -----------------------------------------------------------------------------


async def test_page_reads_the_answer_to_its_post_while_it_is_written(backend, simulator, photo):
    held = simulator.script.caption(["A red", " circle."], hold_after=1)
    async with chromium() as browser:
        page = await browser.new_page()
        await page.goto(backend[1])
        await page.set_input_files("input", photo)
        await page.get_by_text("A red", exact=True).wait_for()
        held.release()
        await page.get_by_text("A red circle.", exact=True).wait_for()
