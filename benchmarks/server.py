"""A raw asyncio server that replays prepared bytes; run by `bench`, in a process of its own.

It reads of a request no more than where it ends and what plan its path names. Streams
of a plan with ``every_us`` share one clock: each has its turn in a round, so that the
packets of all are spread evenly over the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import sys
from collections.abc import Callable

from . import wire
from .wire import Plan

PIECE = 128 * 1024  # handed to the kernel at once, where there is no clock


class Connection(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, groups: dict[str, Group]) -> None:
        self._groups = groups
        self._request = bytearray()
        self._rest: memoryview | None = None  # of a body sent as fast as it goes
        self._paused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to the client."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._request += data
        while True:
            head, blank, _ = self._request.partition(b"\r\n\r\n")
            if not blank:
                return
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            size = len(head) + 4 + int(length or 0)
            if len(self._request) < size:
                return
            del self._request[:size]
            self._play(head.split(b" ", 2)[1].decode())

    def _play(self, path: str) -> None:
        _, text, *_, last = path.split("/")
        plan = Plan.parse(text)
        skill = "chat" if last == "completions" else last
        if plan.kind == "call":
            self.transport.write(wire.CHAT_ANSWER if skill == "chat" else wire.ANSWER)
        elif plan.kind == "release":
            for group in self._groups.values():
                group.go_on()
            self.transport.write(wire.ANSWER)
        elif plan.kind == "first":
            first, *rest = wire.packets(plan, skill)
            self.transport.write(wire.STREAM_HEAD + first)
            asyncio.get_running_loop().call_later(0.01, self.transport.write, b"".join(rest))
        elif plan.every_us:
            self.transport.write(wire.STREAM_HEAD)
            if text not in self._groups:
                packets = wire.packets(plan, skill)
                self._groups[text] = Group(plan, packets, lambda: self._groups.pop(text))
            self._groups[text].add(self.transport)
        else:
            self._rest = memoryview(wire.STREAM_HEAD + b"".join(wire.packets(plan, skill)))
            self.resume_writing()

    def pause_writing(self) -> None:
        """Send no more for now."""
        self._paused = True

    def resume_writing(self) -> None:
        """Send on."""
        self._paused = False
        while self._rest and not self._paused:
            piece, self._rest = self._rest[:PIECE], self._rest[PIECE:]
            self.transport.write(piece)


class Group:
    """Streams that start together, and have their turns one after the other."""

    def __init__(self, plan: Plan, packets: list[bytes], on_end: Callable[[], object]) -> None:
        self._plan = plan
        self._packets = packets
        self._on_end = on_end
        self._transports: list[asyncio.Transport] = []
        self._gates = [asyncio.Event() for _ in range(2)] if plan.hold else []
        self._running: asyncio.Task[None] | None = None

    def add(self, transport: asyncio.Transport) -> None:
        """Take one more; begin when that was the last."""
        self._transports.append(transport)
        if self._plan.hold:
            transport.write(self._packets[0])
        if len(self._transports) == self._plan.streams:
            self._running = asyncio.ensure_future(self._run())

    def go_on(self) -> None:
        """Open the next gate, if there is one."""
        for gate in self._gates:
            if not gate.is_set():
                gate.set()
                return

    async def _run(self) -> None:
        if self._gates:
            _, *middle, last = self._packets
            await self._gates[0].wait()
            await self._play(middle)
            await self._gates[1].wait()
            for transport in self._transports:
                transport.write(last)
        else:
            await self._play(self._packets)
        self._on_end()
        self._running = None

    async def _play(self, packets: list[bytes]) -> None:
        """Send all packets of all streams, each at its time."""
        loop = asyncio.get_running_loop()
        transports = self._transports
        turns = len(transports) * len(packets)
        seconds = self._plan.every_us / 1e6 / len(transports)  # from one turn to the next
        begun = loop.time()
        turn = 0
        while turn < turns:
            due = min(int((loop.time() - begun) / seconds) + 1, turns)
            # Not all that are overdue at once: new connections have their turn, too.
            for each in range(turn, min(due, turn + 200)):
                number, which = divmod(each, len(transports))
                if not transports[which].is_closing():
                    transports[which].write(packets[number])
                turn = each + 1
            await asyncio.sleep(0 if turn < due else begun + turn * seconds - loop.time())


def allow_many_files() -> None:
    """Raise the limit of open files, and so of connections, to the most that is allowed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def main() -> None:
    """Serve until standard input ends; the port is the first line of standard output."""
    allow_many_files()
    gc.disable()
    loop = asyncio.get_running_loop()
    groups: dict[str, Group] = {}
    server = await loop.create_server(lambda: Connection(groups), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
