"""Watch what OpenCV captures; its frames have blue first.

python opencv_camera.py clip.mp4 red
"""

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import cv2

import moondream_async as md
from moondream_async import frames


def captured(source: str) -> Iterator[Any]:
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    try:
        while (taken := capture.read())[0]:
            yield frames.bgr(taken[1])
    finally:
        capture.release()


async def main(source: str, thing: str) -> None:
    async with (
        md.MoondreamClient() as client,
        client.watch(captured(source), "detect", object=thing) as answers,
    ):
        async for each in answers:
            found = each.result.objects if each.result is not None else each.error
            print(f"frame {each.index}, {each.age:.2f} s old: {found}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
