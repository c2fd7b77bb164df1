"""Write a caption as it comes, in uvloop's event loop; Ctrl-C stops it.

python uvloop_program.py photo.jpg
"""

import sys

import uvloop

import moondream_async as md


async def main(path: str) -> None:
    async with md.MoondreamClient() as client, client.caption(path, stream=True) as stream:
        async for piece in stream:
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    try:
        uvloop.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
