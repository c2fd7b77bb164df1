"""Write the first sentences about several pictures, all at once, with task groups of anyio.

Each picture has a cancel scope, which ends its stream when there are enough; Ctrl-C ends all.

python anyio_scopes.py 1 photo.jpg more.jpg
"""

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


async def main(sentences: int, *paths: str) -> None:
    async with md.MoondreamClient() as client, anyio.create_task_group() as group:
        for path in paths:
            group.start_soon(describe, client, path, sentences)


if __name__ == "__main__":
    try:
        anyio.run(main, int(sys.argv[1]), *sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
