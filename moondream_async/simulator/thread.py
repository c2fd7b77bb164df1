"""The simulator for those who have no event loop, or must not share theirs with a server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from .faults import FaultQueue
from .received import Connections, ReceivedRequest
from .script import Script
from .server import Simulator

if TYPE_CHECKING:
    from typing import Self


class SimulatorThread:
    """A `Simulator` that listens in a thread of its own while this is entered.

    For tests without an event loop, or with one of any kind, and for what runs in
    threads and processes of their own::

        with SimulatorThread(Simulator("station")) as simulator:
            simulator.script.caption("A red circle.")
            subprocess.run([...], env={"MOONDREAM_ENDPOINT": simulator.endpoint})
            assert simulator.requests[0].path == "/v1/caption"

    Entering takes a few milliseconds, and so does leaving, which ends open answers. All that
    can be reached here may be reached from any thread. It is entered once.

    Args:
        simulator: Not entered; None is one with nothing special.

    Raises:
        OSError: On entering: it can't listen there.
    """

    def __init__(self, simulator: Simulator | None = None) -> None:
        self._simulator = simulator or Simulator()
        self._thread = threading.Thread(target=self._run, name="moondream-simulator", daemon=True)
        self._listening: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop
        self._left: asyncio.Event

    def __repr__(self) -> str:
        return repr(self._simulator).replace("Simulator", "SimulatorThread", 1)

    @property
    def endpoint(self) -> str:
        """The base URL for a client, as ``http://127.0.0.1:2020/v1``."""
        return self._simulator.endpoint

    @property
    def requests(self) -> list[ReceivedRequest]:
        """The requests received, the oldest first."""
        return self._simulator.requests

    @property
    def connections(self) -> Connections:
        """Tells how many were `accepted` in all and are `open` now."""
        return self._simulator.connections

    @property
    def faults(self) -> FaultQueue:
        """What goes wrong next."""
        return self._simulator.faults

    @property
    def script(self) -> Script:
        """What is answered next, in place of what is measured."""
        return self._simulator.script

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._listening.result()
        except BaseException:
            self._thread.join()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._left.set)
        self._thread.join()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Block until `condition` is true; it is asked, in the server's thread, at every change.

        A change is a connection made or lost, a request received, held or ended, and an
        event sent::

            simulator.wait_until(lambda: any(each.disconnected for each in simulator.requests))

        Raises:
            TimeoutError: It wasn't so within `timeout` seconds.
            RuntimeError: An event loop runs in this thread, and this would hold it up,
                with whatever was to make the condition true; see `until`.
        """
        if _runs_a_loop():
            raise RuntimeError("wait_until would hold up this event loop; use `await ...until()`")
        waiting = asyncio.run_coroutine_threadsafe(
            self._simulator.wait_until(condition), self._loop
        )
        concurrent.futures.wait([waiting], timeout)
        if not waiting.done():
            waiting.cancel()
            raise self._waited_too_long(timeout)
        waiting.result()

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        """Wait as `wait_until` does, in any asyncio loop. Cancelling stops the waiting.

        Raises:
            TimeoutError: It wasn't so within `timeout` seconds.
        """
        waiting = asyncio.run_coroutine_threadsafe(
            self._simulator.wait_until(condition), self._loop
        )
        with anyio.move_on_after(timeout) as limit:
            await asyncio.wrap_future(waiting)
        if limit.cancelled_caught:
            raise self._waited_too_long(timeout)

    def _waited_too_long(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"not so within {timeout} seconds; received: {self.requests}")

    def _run(self) -> None:
        # A loop of this kind whatever the policy: that may make loops for Qt, Trio or libuv.
        loop = asyncio.SelectorEventLoop()
        with contextlib.closing(loop):
            loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = asyncio.Event()
        try:
            await self._simulator.__aenter__()
        except BaseException as error:  # noqa: BLE001 - raised where it was entered
            self._listening.set_exception(error)
            return
        self._listening.set_result(None)
        try:
            await self._left.wait()
        finally:
            await self._simulator.__aexit__()


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
