"""How the interpreter ends with a client in it: in silence, whatever was left open."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
from forked import run_program
from remote_server import answer_then_stall, serving


@pytest.fixture
def stalling():
    with serving(answer_then_stall) as server:
        yield server


START = """
    import asyncio, sys, warnings
    warnings.simplefilter("default")  # and asyncio is in debug mode, as in all of Python's
    import moondream_async as md
    image = md.EncodedImage(b"jpeg", "image/jpeg", 8, 8)
    client = md.MoondreamClient(endpoint=sys.argv[1])

    async def open_stream():
        stream = await client.caption(image, stream=True)
        await stream.__anext__()
        return stream
"""

ENDS = {
    "nothing open": "asyncio.run(client.caption(image))",
    "closed": """
        async def main():
            async with client:
                await open_stream()
        asyncio.run(main())
    """,
    "stream kept after a run": "stream = asyncio.run(open_stream())",
    "stream dropped after a run": "asyncio.run(open_stream())",
    "stream in a loop that rests": """
        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(open_stream())
    """,
    "stream in a loop closed by hand": """
        loop = asyncio.new_event_loop()
        stream = loop.run_until_complete(open_stream())
        loop.close()
    """,
    "idle connection in a loop that rests": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(client.caption(image))
    """,
    "exit inside a stream": """
        async def main():
            async for piece in await client.caption(image, stream=True):
                sys.exit()
        asyncio.run(main())
    """,
    "exit inside an entered stream": """
        async def main():
            async with client, client.caption(image, stream=True) as stream:
                async for piece in stream:
                    sys.exit()
        asyncio.run(main())
    """,
    "reader left running": """
        async def main():
            global reader
            reader = asyncio.ensure_future((await open_stream()).text())
            await asyncio.sleep(0)
        asyncio.run(main())
    """,
    "stream in a daemon thread": """
        import threading
        opened = threading.Event()
        async def main():
            stream = await open_stream()
            opened.set()
            await stream.text()
        threading.Thread(target=asyncio.run, args=(main(),), daemon=True).start()
        opened.wait()
    """,
}


# What may be said with warnings on: our own, how Python comments on them, that the script's
# loop was not closed, and, in debug mode, that a loaded machine was slow.
EXPECTED = re.compile(
    r".*ResourceWarning: (CaptionStream|A MoondreamClient) was dropped"
    r"|ResourceWarning: Enable tracemalloc"
    r"|Object allocated at|  "
    r"|.*ResourceWarning: unclosed event loop"
    r"|.*ResourceWarning: unclosed <socket\.socket .* family=(1|AddressFamily.AF_UNIX),"
    r"|Executing <"
)


def script_of(end):
    return textwrap.dedent(START) + textwrap.dedent(end)


async def forked(end, *arguments):
    """Run it to its end in a fork, with warnings on, and asyncio in debug mode."""
    arguments = ["-c", script_of(end), *arguments]
    return await run_program(arguments, env=os.environ | {"PYTHONASYNCIODEBUG": "1"})


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_interpreter_ends_in_silence(stalling, end):
    done = await forked(end, stalling.endpoint)
    assert (done.returncode, done.stdout) == (0, b"")
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if not EXPECTED.match(line)] == []


@pytest.mark.slow
def test_interpreter_of_a_user_ends_in_silence(stalling):
    """Without warnings."""
    script = script_of(ENDS["stream in a loop that rests"]).replace("warnings.simplefilter", "str")
    done = subprocess.run(
        [sys.executable, "-c", script, stalling.endpoint], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


LEFT_BY_CTRL_C = """
    def interrupt():
        raise KeyboardInterrupt

    async def main():
        stream = await client.caption(sys.argv[2], stream=True)
        await stream.__anext__()
        loop.call_soon(interrupt)
        await stream.text()

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(main())
    except KeyboardInterrupt:
        pass
"""


async def test_interpreter_ends_though_ctrl_c_left_a_call_lying(stalling, photo):
    """Its picture was prepared in a thread, which must not wait for the call to end."""
    assert (await forked(LEFT_BY_CTRL_C, stalling.endpoint, str(photo))).returncode == 0
