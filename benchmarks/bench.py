"""Starts the server and the contenders, and has them measured in turns."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import contenders

if TYPE_CHECKING:
    from typing import Self

ROOT = Path(__file__).parent.parent


class Child:
    """A Python module that runs in a process of its own and is spoken to in lines."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def hear(self) -> Any:
        """Return its next line.

        Raises:
            RuntimeError: It has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, task: str, **arguments: Any) -> Any:
        """Have a worker do a task; return what it measured."""
        assert self._process.stdin is not None
        print(json.dumps([task, arguments]), file=self._process.stdin, flush=True)
        return self.hear()

    def close(self) -> None:
        """End it, and wait for that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Bench:
    """What a scenario measures with."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        """Contenders that could not be had, and why."""
        self.names: dict[str, str] = {}
        """What the tables call the contenders that there are."""
        for name in contenders.ALL:
            try:
                module = contenders.load(name)
            except ImportError as error:
                self.left_out[name] = str(error)
            else:
                self.names[name] = module.NAME
                self.versions |= contenders.versions(module)

    def __enter__(self) -> Self:
        self._server = Child("server")
        self.origin = f"http://127.0.0.1:{self._server.hear()}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.close()

    def say(self, text: str) -> None:
        """Tell on stderr what is going on."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def workers(self, names: Iterable[str]) -> Iterator[dict[str, Child]]:
        """Start a process for each contender; leave out those that are not installed."""
        found: dict[str, Child] = {}
        with contextlib.ExitStack() as stack:
            for name in names:
                if name not in self.left_out:
                    found[name] = child = Child("worker", name)
                    stack.callback(child.close)
            for child in found.values():
                child.hear()  # its name; it is ready
            yield found

    def rounds(
        self,
        count: int,
        tasks: dict[str, tuple[str, str, dict[str, Any]]],
        *,
        fresh: bool = False,
        seldom: Container[str] = (),
    ) -> dict[str, list[Any]]:
        """Measure each task once a round, one after the other, so that all have the same weather.

        Args:
            count: How many rounds.
            tasks: Label to contender, name of the task, and its arguments.
            fresh: Whether each task has a new process each time.
            seldom: Contenders that take so long that the half of the rounds must do.
        """
        results: dict[str, list[Any]] = {}
        with contextlib.ExitStack() as stack:
            names = dict.fromkeys(name for name, _, _ in tasks.values())
            children = {} if fresh else stack.enter_context(self.workers(names))
            for number in range(count):
                for label, (name, task, arguments) in tasks.items():
                    if name in seldom and number >= (count + 1) // 2:
                        continue
                    with contextlib.ExitStack() as this_time:
                        if fresh:
                            children = this_time.enter_context(self.workers([name]))
                        if name not in children:
                            continue
                        begun = time.perf_counter()
                        result = children[name].ask(task, origin=self.origin, **arguments)
                        results.setdefault(label, []).append(result)
                        self.say(f"  {label}: {time.perf_counter() - begun:.1f} s")
        return results
