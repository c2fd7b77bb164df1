"""Moving pictures of other people's libraries: the recipes, as programs."""

import numpy as np
import pytest
from programs import RECIPES, STRICT, running

from moondream_async import frames

cv2 = pytest.importorskip("cv2", reason="opencv-python-headless is not installed")
pytest.importorskip("av", reason="the extra video is not installed")
from pictures_moving import make_clip  # noqa: E402 - needs it


async def test_what_opencv_captures_is_watched_to_its_last_frame(simulator, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", count=12)
    command = (*STRICT, RECIPES / "opencv_camera.py", clip, "red")
    async with running(*command, MOONDREAM_ENDPOINT=simulator.endpoint) as program:
        status, said, complaints = await program.end()
    assert (status, complaints) == (0, [])
    assert said.splitlines()[-1].startswith("frame 11, ")


async def test_opencvs_pictures_keep_their_colours(client, photo):
    whole = cv2.imread(str(photo))
    assert np.array_equal(frames.bgr(whole), cv2.cvtColor(whole, cv2.COLOR_BGR2RGB))
    async with client.watch([frames.bgr(whole)]) as answers:
        assert (await anext(answers)).ok
