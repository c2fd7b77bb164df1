"""Programs in processes of their own, each forked from one that has imported everything.

The program is the command line, or, as for an interpreter, ``-c`` and a script.

A fresh interpreter takes two seconds of a processor to import what a command needs, a fork
some milliseconds; and it is the real program all the same, with streams, signals, a folder,
an environment and an end of its own. What starts an interpreter is tested without this.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import types
from pathlib import Path

import anyio
from anyio.abc import AsyncResource

# -- the tests' side ------------------------------------------------------------------------


async def run_program(args, *, input=b"", cwd=None, env=None):  # noqa: A002 - as in anyio
    """Run ``moondream-async`` with `args` to its end, as `anyio.run_process` does."""
    async with await open_program(args, cwd=cwd, env=env) as process:
        output = {}

        async def read(name):
            output[name] = b"".join([data async for data in getattr(process, name)])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, "stdout")
            tasks.start_soon(read, "stderr")
            with contextlib.suppress(anyio.BrokenResourceError):
                await process.stdin.send(input)
            await process.stdin.aclose()
        status = await process.wait()
    return subprocess.CompletedProcess(args, status, output["stdout"], output["stderr"])


async def open_program(
    args,
    *,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=None,
    env=None,
    in_control=False,
):
    """Start ``moondream-async`` as `anyio.open_process` does; `in_control` of its terminal."""
    ours, theirs = [], []
    with contextlib.ExitStack() as closing:
        for number, wanted in enumerate([stdin, stdout, stderr]):
            end = None
            if wanted == subprocess.PIPE:
                reads, writes = os.pipe()
                end, its = (writes, reads) if number == 0 else (reads, writes)
                closing.callback(os.close, its)
            elif wanted == subprocess.STDOUT:
                its = theirs[1]
            elif wanted == subprocess.DEVNULL:
                its = os.open(os.devnull, os.O_RDWR)
                closing.callback(os.close, its)
            else:
                its = wanted if isinstance(wanted, int) else wanted.fileno()
            ours.append(end)
            theirs.append(its)
        told = {
            "args": [*map(str, args)],
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "in_control": in_control,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(_nursery())
        data = json.dumps(told).encode()
        sent = socket.send_fds(connection, [data], theirs)
        connection.sendall(data[sent:])
        connection.shutdown(socket.SHUT_WR)
        connection.setblocking(False)
    process = Process(connection, *ours)
    await process.started()
    return process


class Process(AsyncResource):
    """A program that was started."""

    def __init__(self, connection, stdin, stdout, stderr):
        self._connection = connection
        self._told = b""  # its id, a line, and, when it has ended, its status, another one
        self._over = False
        self.stdin = stdin and Pipe(stdin)
        self.stdout = stdout and Pipe(stdout)
        self.stderr = stderr and Pipe(stderr)

    def _read(self):
        with contextlib.suppress(BlockingIOError):
            while not self._over:
                data = self._connection.recv(100)
                self._told += data
                self._over = not data

    async def _until(self, lines):
        while self._told.count(b"\n") < lines:
            await anyio.wait_readable(self._connection)
            self._read()
            assert not self._over or self._told.count(b"\n") >= lines, "it could not be started"

    async def started(self):
        await self._until(1)
        self.pid = int(self._told.split()[0])

    @property
    def returncode(self):
        self._read()
        return int(self._told.split()[1]) if self._told.count(b"\n") == 2 else None

    async def wait(self):
        await self._until(2)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # its end has yet to be told
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    async def aclose(self):
        try:
            for pipe in filter(None, (self.stdin, self.stdout, self.stderr)):
                await pipe.aclose()
            await self.wait()
        finally:
            self.kill()
            self._connection.close()


class Pipe:
    """Our end of a pipe."""

    def __init__(self, end):
        self._end = end
        os.set_blocking(end, False)

    async def receive(self, most=65536):
        await anyio.wait_readable(self._end)
        if data := os.read(self._end, most):
            return data
        raise anyio.EndOfStream

    async def __aiter__(self):
        with contextlib.suppress(anyio.EndOfStream):
            while True:
                yield await self.receive()

    async def send(self, data):
        view = memoryview(data)
        while view:
            await anyio.wait_writable(self._end)
            try:
                view = view[os.write(self._end, view) :]
            except BrokenPipeError as error:
                raise anyio.BrokenResourceError from error

    async def aclose(self):
        if self._end is not None:
            os.close(self._end)
        self._end = None


_SHARED = "MOONDREAM_TESTS_FORK_FROM"


def share():
    """Let the processes that are started from here on fork their programs from one process."""
    os.environ[_SHARED] = _nursery()


@functools.cache
def _nursery():
    """Start the process that programs are forked from; return where it listens."""
    if shared := os.environ.get(_SHARED):
        return shared
    folder = tempfile.TemporaryDirectory(prefix="programs")
    address = str(Path(folder.name) / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # whose end is the end of it
        )

    @atexit.register
    def end():
        process.stdin.close()
        process.wait()
        folder.cleanup()

    return address


# -- the other side -------------------------------------------------------------------------


def serve(listener):
    """Fork programs as long as stdin is open; return in each, with what it was told."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for programs
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        connection, _ = listener.accept()
        if os.fork() == 0:
            break
        connection.close()
    data, ends, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while more := connection.recv(1 << 20):
        data += more
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if pid := os.fork():
        for end in ends:
            os.close(end)
        connection.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    connection.detach()
    listener.detach()
    for number, end in enumerate(ends):
        os.dup2(end, number)
    os.closerange(3, 1000)
    return json.loads(data)


def begin(told):
    """Make of this process what a fresh one would be."""
    os.environ.clear()
    os.environ.update(told["env"])
    os.chdir(told["cwd"])
    if told["in_control"]:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["moondream-async", *told["args"]]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), "utf-8")
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(number, "wb", closefd=False)),
            os.environ.get("PYTHONIOENCODING", "utf-8"),
            errors="strict" if number == 1 else "backslashreplace",
            line_buffering=number == 2 or os.isatty(number),
        )
        setattr(sys, name, stream)


def import_everything():
    import PIL.Image

    import moondream_async
    from moondream_async.cli import main

    for module in pkgutil.walk_packages(moondream_async.__path__, "moondream_async."):
        if not re.search("__main__|integrations", module.name):
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                importlib.import_module(module.name)
    importlib.import_module("rich.live")
    with contextlib.suppress(ImportError):
        importlib.import_module("webdataset")
    PIL.Image.init()
    anyio.run(anyio.sleep, 0)
    # Between two looks at a batch: a server that goes on with each look needs no time.
    moondream_async.batch.batches.Batches.wait.__kwdefaults__["interval"] = 0.01
    with contextlib.redirect_stderr(io.StringIO()):
        main(["caption", "a.jpg", "--top-p", "2"])  # wrong usage, for which typer loads the rest
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))
    import_everything()
    begin(serve(socket.socket(fileno=int(sys.argv[1]))))
    if sys.argv[1:2] == ["-c"]:
        _, _, script, *arguments = sys.argv
        sys.argv = ["-c", *arguments]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(script, vars(sys.modules["__main__"]))
    else:
        from moondream_async.cli import main

        sys.exit(main(sys.argv[1:]))
