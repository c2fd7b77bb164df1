"""Programs in processes of their own: what they say, and what is said to them."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import sys
import tempfile
import termios
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import anyio
import pytest
from forked import open_program

RECIPES = Path(__file__).parent / "recipes"
STRICT = [sys.executable, "-X", "dev", "-W", "error"]

# What a flawless program may say: that a loaded machine was slow (asyncio in debug mode), and
# what a window can't do that nobody sees (Qt).
_NOISE = re.compile(r"Executing <|This plugin does not support propagateSizeHints")


def needs(*packages):
    """Skip where one of them is missing; all of them are in the extra for foreign loops."""
    missing = [name for name in packages if not _is_there(name)]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs: python -m pip install '.[loops]' ({', '.join(missing)})"
    )


def _is_there(name):
    """Look for a package, or a part of one, without importing anything."""
    package, _, part = name.partition(".")
    spec = find_spec(package)
    if spec is None:
        return False
    return any((Path(place) / part).exists() for place in spec.submodule_search_locations)


class Program:
    """A program that runs."""

    def __init__(self, process, errors):
        self.said = ""
        self._process = process
        self._errors = errors
        self._unread = b""

    @property
    def runs(self):
        return self._process.returncode is None

    async def _read(self):
        return await self._process.stdout.receive()

    async def until(self, condition):
        """Wait until `condition(said)` is true, or what it says where that is a text."""
        while not (condition in self.said if isinstance(condition, str) else condition(self.said)):
            self._unread += await self._read()
            self.said = self._unread.decode(errors="ignore")

    async def tell(self, line):
        await self._process.stdin.send(f"{line}\n".encode())

    def interrupt(self):
        """Do what Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    async def end(self):
        """Wait for its end; return its exit status, all that it said, and what it complained of."""
        try:
            while True:
                await self.until(lambda _: False)
        except (anyio.EndOfStream, OSError):
            status = await self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode().splitlines()
        return status, self.said, [line for line in lines if not _NOISE.match(line)]


@asynccontextmanager
async def running(*command, **environment):
    """Start a program; what is still running at the end is killed."""
    with tempfile.TemporaryFile() as errors:
        process = await _open(command, stderr=errors, env=os.environ | environment)
        try:
            yield Program(process, errors)
        finally:
            await _kill(process)


class TerminalProgram(Program):
    """A program that has a terminal to itself."""

    def __init__(self, process, terminal):
        super().__init__(process, errors=io.BytesIO())  # they go to the terminal, too
        self._terminal = terminal

    async def _read(self):
        await anyio.wait_readable(self._terminal)
        return os.read(self._terminal, 65536)

    def press(self, keys):
        os.write(self._terminal, keys)


@asynccontextmanager
async def running_in_terminal(*command, **environment):
    """Start a program in a terminal of 24 lines of 80 characters."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    ends = {"stdin": its, "stdout": its, "stderr": its}
    environment = os.environ | {"TERM": "xterm-256color"} | environment
    process = await _open(command, env=environment, in_control=True, **ends)
    os.close(its)
    try:
        yield TerminalProgram(process, ours)
    finally:
        await _kill(process)
        os.close(ours)


async def _open(command, *, in_control=False, **options):
    """Open a process; the command line itself is forked from one that has imported it."""
    if command[0] == "moondream-async":
        return await open_program(command[1:], in_control=in_control, **options)
    return await anyio.open_process([*map(str, command)], start_new_session=in_control, **options)


async def _kill(process):
    if process.returncode is None:
        process.kill()
    await process.aclose()
