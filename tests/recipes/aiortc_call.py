"""Watch the other side's video in a WebRTC call, as aiortc receives it.

python aiortc_call.py clip.mp4 red

The other side is a second connection here, which plays a file; in a program of yours it is a
browser, and offer and answer go over your web server.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection
from aiortc.contrib.media import MediaPlayer
from aiortc.mediastreams import MediaStreamError

import moondream_async as md
from moondream_async import frames


async def received(track: MediaStreamTrack) -> AsyncIterator[frames.Frame]:
    """Yield what a track receives, until the other side hangs up."""
    index = 0
    while True:
        try:
            picture = await track.recv()
        except MediaStreamError:  # the other side has hung up
            return
        image = picture.to_ndarray(format="rgb24")
        yield frames.Frame(image=image, time=float(picture.time or 0), index=index)
        index += 1


async def watch(track: MediaStreamTrack, thing: str) -> None:
    async with (
        md.MoondreamClient() as client,
        client.watch(received(track), "detect", object=thing) as answers,
    ):
        async for each in answers:
            found = each.result.objects if each.result is not None else each.error
            print(f"{each.frame.time:.2f} s, {each.age:.2f} s old: {found}", flush=True)


async def main(clip: str, thing: str) -> None:
    # Both are on this machine, so no server of others is asked where they are.
    ours, theirs = (RTCPeerConnection(RTCConfiguration(iceServers=[])) for _ in range(2))
    tracks: asyncio.Queue[MediaStreamTrack] = asyncio.Queue()
    ours.on("track", tracks.put_nowait)
    video = MediaPlayer(clip).video
    over = asyncio.Event()
    video.on("ended", over.set)
    theirs.addTrack(video)

    async def hang_up() -> None:
        await over.wait()
        await theirs.close()

    hanging_up = asyncio.create_task(hang_up())
    try:
        await theirs.setLocalDescription(await theirs.createOffer())
        await ours.setRemoteDescription(theirs.localDescription)
        await ours.setLocalDescription(await ours.createAnswer())
        await theirs.setRemoteDescription(ours.localDescription)
        await watch(await tracks.get(), thing)
    finally:
        over.set()
        await hanging_up
        await ours.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
