"""Small videos, for tests."""

import av
import numpy as np


def make_clip(path, count=90, rate=30, size=(64, 48)):
    """Write a video of a colour that grows; return its path."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            picture = np.full((height, width, 3), (number * 2 % 256, 80, 20), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def times(path):
    """The time of each frame, as PyAV has it."""
    with av.open(str(path)) as container:
        return [picture.time for picture in container.decode(video=0)]
