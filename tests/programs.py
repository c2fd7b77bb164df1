"""Programs in processes of their own: what they say, and what is said to them."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import anyio
import pytest
from forked import open_program, run_program

PROGRAM = [sys.executable, "-m", "moondream_async"]
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


async def run(*args, stdin=b"", cwd=None, **environment):
    """Run the command line; return its exit status, and what it says on stdout and on stderr."""
    done = await run_program(args, input=stdin, cwd=cwd, env=os.environ | environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class Program:
    """A program that runs."""

    def __init__(self, process, errors):
        self.said = ""
        self._process = process
        self._errors = errors
        self._unread = b""
        self._looks_away = process.stdout is None

    @property
    def pid(self):
        return self._process.pid

    @property
    def runs(self):
        return self._process.returncode is None

    async def _read(self):
        return await self._process.stdout.receive()

    async def _read_more(self):
        """Read what it says next; return whether it said anything before its end."""
        if self._looks_away:
            return False
        try:
            data = await self._read()
        except (anyio.EndOfStream, OSError):  # the latter is how a terminal ends
            return False
        self._unread += data
        self.said = self._unread.decode(errors="ignore")  # a character may be on its way
        return bool(data)

    async def until(self, condition, *, after=0):
        """Wait until `condition(said)` is true, or a text was said behind the first `after`."""
        while not (condition(self.said) if callable(condition) else condition in self.said[after:]):
            assert await self._read_more(), f"not {condition!r}: {self.said!r}"

    async def tell(self, line):
        await self._process.stdin.send(f"{line}\n".encode())

    async def look_away(self):
        """Go, as the reader of what it says."""
        self._looks_away = True
        await self._process.stdout.aclose()

    def interrupt(self):
        """Do what Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)

    def kill(self):
        self._process.kill()

    async def end(self):
        """Wait for its end; return its exit status, all that it said, and what it complained of."""
        while await self._read_more():
            pass
        status = await self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode().splitlines()
        return status, self.said, [line for line in lines if not _NOISE.match(line)]


@asynccontextmanager
async def running(*command, cwd=None, stdout=subprocess.PIPE, stderr=None, **environment):
    """Start a program; what is still running at the end is killed."""
    with tempfile.TemporaryFile() as errors:
        ends = {"stdout": stdout, "stderr": stderr or errors}
        process = await _open(command, **ends, cwd=cwd, env=os.environ | environment)
        try:
            yield Program(process, errors)
        finally:
            await _kill(process)


class TerminalProgram(Program):
    """A program that has a terminal to itself."""

    def __init__(self, process, terminal):
        super().__init__(process, errors=io.BytesIO())  # they go to the terminal, too
        self._terminal = terminal
        self._looks_away = False

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
