"""Write the first sentences about several pictures, all at once, with task groups of anyio.

Each picture has a cancel scope, which ends its stream when there are enough. Ctrl-C cancels that
of the group, and so all of them.

python anyio_scopes.py 1 photo.jpg more.jpg
"""

import signal
import sys

import anyio

import moondream_async as md


async def describe(client: md.MoondreamClient, path: str, sentences: int) -> None:
    text = ""
    with anyio.CancelScope() as scope:
        async with client.caption(path, stream=True) as stream:
            async for piece in stream:
                text += piece
                if text.count(".") == sentences:
                    scope.cancel()
    print(f"{path}: {text}", flush=True)


async def stop_at_ctrl_c(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()


async def main(sentences: int, *paths: str) -> None:
    async with anyio.create_task_group() as program:
        program.start_soon(stop_at_ctrl_c, program.cancel_scope)
        async with md.MoondreamClient() as client, anyio.create_task_group() as pictures:
            for path in paths:
                pictures.start_soon(describe, client, path, sentences)
        program.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(main, int(sys.argv[1]), *sys.argv[2:])
