"""A simulator in a process of its own, for those that talk to it from several processes.

    python simulate.py KEY [held]

prints its endpoint, and ends with its standard input. There "go" lets the requests go on
that it held from the start, and "tell" has it print, as JSON, how many requests came in
all, how many were open at once at most, and the seconds from the first to the last.
"""

import asyncio
import json
import subprocess
import sys
import time
from contextlib import contextmanager

from aiohttp import web


class SimulatorProcess:
    """The other end: what a test has of it."""

    def __init__(self, process):
        self._process = process
        self.endpoint = process.stdout.readline().strip()

    def go(self):
        self._write("go")

    def tell(self):
        self._write("tell")
        return json.loads(self._process.stdout.readline())

    def _write(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


@contextmanager
def simulator_process(key, *, held=False):
    command = [sys.executable, __file__, key, *(["held"] if held else [])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield SimulatorProcess(process)


async def main(key, held=None):
    from moondream_async.simulator import Simulator

    may_go_on = asyncio.Event()
    if held is None:
        may_go_on.set()
    arrivals, is_open, most_open = [], 0, 0

    @web.middleware
    async def count(request, handler):
        nonlocal is_open, most_open
        arrivals.append(time.monotonic())
        is_open += 1
        most_open = max(most_open, is_open)
        try:
            await may_go_on.wait()
            return await handler(request)
        finally:
            is_open -= 1

    simulator = Simulator(api_key=key)
    simulator.app.middlewares.append(count)
    async with simulator:
        print(simulator.endpoint, flush=True)  # noqa: T201 - a program
        while line := await asyncio.to_thread(sys.stdin.readline):
            if line == "go\n":
                may_go_on.set()
                continue
            span = arrivals[-1] - arrivals[0] if arrivals else 0
            told = {"requests": len(arrivals), "most_open": most_open, "span": span}
            print(json.dumps(told), flush=True)  # noqa: T201 - a program


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
