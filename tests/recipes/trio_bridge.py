"""Write a caption as it comes, in a trio program, by way of trio-asyncio; Ctrl-C stops it.

What uses the client runs on asyncio's side as a whole: trio can cancel it there, and its
`async with` closes the connection. (A stream entered on trio's side could not be closed any
more in a scope that has been cancelled.)

python trio_bridge.py photo.jpg
"""

import signal
import sys

import trio
import trio_asyncio

import moondream_async as md


@trio_asyncio.aio_as_trio
async def caption(path: str) -> None:
    async with md.MoondreamClient() as client, client.caption(path, stream=True) as stream:
        async for piece in stream:
            print(piece, end="", flush=True)
    print()


async def stop_at_ctrl_c(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


async def main(path: str) -> None:
    async with trio_asyncio.open_loop(), trio.open_nursery() as nursery:
        nursery.start_soon(stop_at_ctrl_c, nursery.cancel_scope)
        await caption(path)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
