"""Videos in ``bulk``: each frame once, with the time that PyAV has, whatever ends the program."""

import pytest
from bulk_runs import records

pytest.importorskip("av", reason="the extra video is not installed")
from pictures_moving import make_clip, times

pytestmark = pytest.mark.slow  # each test runs the program several times


@pytest.fixture
def clip(tmp_path):
    """Thirty frames, three seconds."""
    return make_clip(tmp_path / "clip.mp4", count=30, rate=10)


async def test_a_video_that_was_killed_goes_on_in_the_middle(
    simulator, bulk, started, clip, tmp_path
):
    arguments = ("clip.mp4", "-o", "out.jsonl", "--concurrency", "1")
    simulator.faults.extend(["slow_start=0"] * 9 + ["slow_start=300"])
    async with started(*arguments) as program:
        await simulator.wait_until(lambda: len(simulator.requests) == 10)
        program.kill()
        await program.end()
    assert len(records(tmp_path / "out.jsonl")) == 9
    said = await bulk(*arguments)
    assert "21 answered, 0 failed, 9 done before" in said
    lines = records(tmp_path / "out.jsonl")
    assert sorted(each["time"] for each in lines) == times(clip)
    assert len({each["path"] for each in lines}) == 30
    assert all("caption" in each for each in lines)
    make_clip(clip, count=20, rate=10)
    said = await bulk(*arguments)
    assert "20 answered" in said  # it is another video


SUBTITLES = {
    "vtt": "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nA ",
    "srt": "1\n00:00:00,000 --> 00:00:01,000\nA ",
}


@pytest.mark.parametrize("ending", SUBTITLES)
async def test_captions_of_a_video_are_subtitles(bulk, clip, tmp_path, ending):
    await bulk("clip.mp4", "--every", "1s", "-o", f"out.{ending}")
    text = (tmp_path / f"out.{ending}").read_text("utf-8")
    assert text.startswith(SUBTITLES[ending])
    assert text.count(" --> ") == 3
    assert "00:00:02" in text
    assert (
        sorted(each["time"] for each in records(tmp_path / f"out.{ending}.jsonl"))
        == times(clip)[::10]
    )
