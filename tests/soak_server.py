"""A server for the soak: it plays whatever a seed says, in a process of its own.

``python tests/soak_server.py SEED`` prints its port and goes on until its input ends.
"""

import asyncio
import random
import sys

from raw_server import DONE, EVENTS, STREAM_HEAD, RawServer, in_chunks


async def main(seed):
    chance = random.Random(seed)

    async def play(peer):
        while True:
            await peer.request()
            fate = chance.random()
            some = EVENTS[: chance.randrange(len(EVENTS) + 1)]
            if fate < 0.7:
                await peer.send(STREAM_HEAD + in_chunks(*EVENTS, DONE))
            elif fate < 0.8:
                await peer.send(STREAM_HEAD + in_chunks(*some, end=False))
                return
            elif fate < 0.9:
                await peer.send(STREAM_HEAD + in_chunks(*some, end=False))
                peer.reset()
                return
            else:
                await peer.send(STREAM_HEAD + in_chunks(*some, end=False))
                await peer.until_gone()
                return

    async with RawServer(play) as server:
        print(server.port, flush=True)  # noqa: T201 - a program
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
