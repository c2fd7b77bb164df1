"""The simulator in a thread of its own, for programs without an event loop to share."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from .server import Simulator

if TYPE_CHECKING:
    from typing import Self


class SimulatorThread:
    """A `Simulator` that listens in a thread of its own while this is entered.

    For tests without an event loop or with any kind of loop, and for programs that run in
    threads and processes of their own::

        with SimulatorThread(Simulator("station")) as simulator:
            simulator.script.caption("A red circle.")
            subprocess.run([...], env={"MOONDREAM_ENDPOINT": simulator.endpoint})
            assert simulator.requests[0].path == "/v1/caption"

    Entering takes a few milliseconds, and so does leaving, which ends open answers. All
    attributes may be used from any thread. A `SimulatorThread` is entered once.

    Args:
        simulator: Not entered yet; None makes one with all defaults.

    Attributes:
        requests: The requests received, the oldest first.
        connections: Counts the connections `accepted` in all and `open` now.
        faults: What goes wrong next.
        script: The answers to give next, in place of measured ones.

    Raises:
        OSError: On entering: the simulator can't listen on its host and port.
    """

    def __init__(self, simulator: Simulator | None = None) -> None:
        self._simulator = simulator or Simulator()
        self.requests = self._simulator.requests
        self.connections = self._simulator.connections
        self.faults = self._simulator.faults
        self.script = self._simulator.script
        self._stack = contextlib.ExitStack()
        self._portal: BlockingPortal

    def __repr__(self) -> str:
        return repr(self._simulator).replace("Simulator", "SimulatorThread", 1)

    @property
    def endpoint(self) -> str:
        """The base URL for a client, as ``http://127.0.0.1:2020/v1``."""
        return self._simulator.endpoint

    def __enter__(self) -> Self:
        # A selector loop under any policy: a policy may make loops for Qt, Trio or libuv.
        options = {"loop_factory": asyncio.SelectorEventLoop}
        with contextlib.ExitStack() as stack:
            self._portal = stack.enter_context(
                start_blocking_portal("asyncio", options, name="moondream-simulator")
            )
            stack.callback(self._portal.call, self._portal.stop, True)  # noqa: FBT003 - anyio's
            stack.enter_context(self._portal.wrap_async_context_manager(self._simulator))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Block until `condition` is true; the server's thread calls it at every change.

        A change is a connection made or lost, a request received, held or ended, and an
        event sent::

            simulator.wait_until(lambda: any(each.disconnected for each in simulator.requests))

        Raises:
            TimeoutError: The condition wasn't true within `timeout` seconds.
            RuntimeError: An event loop runs in this thread: blocking would stop the loop,
                and all that could make the condition true; see `until`. Or the simulator
                was left meanwhile.
        """
        if _runs_a_loop():
            raise RuntimeError("wait_until would hold up this event loop; use `await ...until()`")
        waiting = self._wait(condition)
        concurrent.futures.wait([waiting], timeout)
        if not waiting.done():
            waiting.cancel()
            raise self._waited_too_long(timeout)
        waiting.result()

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Wait as `wait_until` does, in any asyncio loop. Cancelling stops the waiting.

        Raises:
            TimeoutError: The condition wasn't true within `timeout` seconds.
            RuntimeError: The simulator was left meanwhile.
        """
        with anyio.move_on_after(timeout) as limit:
            await asyncio.wrap_future(self._wait(condition))
        if limit.cancelled_caught:
            raise self._waited_too_long(timeout)

    def _wait(self, condition: Callable[[], bool]) -> concurrent.futures.Future[None]:
        return self._portal.start_task_soon(self._wait_here, condition)

    async def _wait_here(self, condition: Callable[[], bool]) -> None:
        try:
            await self._simulator.wait_until(condition)
        except asyncio.CancelledError:
            # By the caller, who is no longer there to see this, or since the thread ends.
            raise RuntimeError("the simulator was left while this waited for it") from None

    def _waited_too_long(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"not so within {timeout} seconds; received: {self.requests}")


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
