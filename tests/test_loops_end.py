"""How the interpreter ends with a client in it: in silence, whatever was left open."""

import re
import subprocess
import sys
import textwrap

import pytest
from remote_server import answer_then_stall, serving


@pytest.fixture
def stalling():
    with serving(answer_then_stall) as server:
        yield server


START = """
    import asyncio, sys
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "flags"),
    # What is said as users run it is said with warnings on, too.
    [*[(end, ["-X", "dev"]) for end in ENDS], ("stream in a loop that rests", [])],
    ids=lambda each: each if isinstance(each, str) else " ".join(each),
)
def test_interpreter_ends_in_silence(stalling, end, flags):
    script = textwrap.dedent(START) + textwrap.dedent(ENDS[end])
    done = subprocess.run(
        [sys.executable, *flags, "-c", script, stalling.endpoint],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    if not flags:
        assert done.stderr == ""
    assert [line for line in done.stderr.splitlines() if not EXPECTED.match(line)] == []


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


def test_interpreter_ends_though_ctrl_c_left_a_call_lying(stalling, photo):
    """Its picture was prepared in a thread, which must not wait for the call to end."""
    script = textwrap.dedent(START) + textwrap.dedent(LEFT_BY_CTRL_C)
    command = [sys.executable, "-c", script, stalling.endpoint, str(photo)]

    assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
