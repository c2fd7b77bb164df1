"""Moving pictures of other people's libraries: the recipes, as programs."""

import re
import runpy

import numpy as np
import pytest
from programs import RECIPES, STRICT, needs, running

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


@needs("aiortc")
async def test_the_other_sides_video_in_a_webrtc_call_is_watched(
    simulator, tmp_path, monkeypatch, capsys
):
    from aioice.ice import get_host_addresses

    if not get_host_addresses(use_ipv4=True, use_ipv6=True):
        pytest.skip("this machine has no address but 127.0.0.1, which WebRTC does not use")
    clip = make_clip(tmp_path / "clip.mp4", count=12)
    monkeypatch.setenv("MOONDREAM_ENDPOINT", simulator.endpoint)
    recipe = runpy.run_path(str(RECIPES / "aiortc_call.py"))
    await recipe["main"](str(clip), "red")
    found = re.findall(r"([.0-9]+) s, [.0-9]+ s old: \[", capsys.readouterr().out)
    times = [float(each) for each in found]
    assert times
    assert times == sorted(times)
    assert len(simulator.requests) >= len(times)
