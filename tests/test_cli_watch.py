"""The command ``watch``: a line for each answer, and nothing left open when it ends."""

import json
import re
from functools import partial

import pytest
from programs import running
from raw_server import head
from remote_server import serving

from moondream_async.simulator import SAMPLE_IMAGE

pytest.importorskip("av", reason="the extra video is not installed")
from pictures_moving import make_clip, times

pytestmark = pytest.mark.slow  # on one Python version

LINE = re.compile(r"\d+\.\d{3} s, \d+\.\d\d s old: \S.*")


@pytest.fixture
def clip(tmp_path):
    """Twelve frames, 0.4 seconds."""
    return make_clip(tmp_path / "clip.mp4", count=12)


@pytest.fixture
def watch(command):
    return partial(command, "watch")


def test_each_answer_is_a_line_with_its_time_and_age(watch, clip):
    status, said, errors = watch(clip)
    assert (status, errors) == (0, "")
    assert said
    assert all(map(LINE.fullmatch, said.splitlines()))


SKILLS = {
    "caption": [],
    "answer": ["--skill", "query", "--question", "How wide is it?"],
    "objects": ["--skill", "detect", "--object", "red"],
    "points": ["--skill", "point", "--object", "red"],
    "path": ["--skill", "segment", "--object", "red"],
}


@pytest.mark.parametrize("key", SKILLS)
def test_json_has_the_frame_and_the_answer_of_each_skill(watch, clip, key):
    status, said, errors = watch(clip, *SKILLS[key], "--json")
    assert (status, errors) == (0, "")
    for each in map(json.loads, said.splitlines()):
        assert list(each)[:5] == ["index", "time", "taken_at", "age", "skipped"]
        assert key in each
        assert each["time"] == times(clip)[each["index"]]
    assert each["index"] == 11  # the last frame is always asked about


TEXTS = {  # what is scripted, and what the line says of it
    "caption": ("", "The answer is empty."),
    "answer": ("", "The answer is empty."),
    "objects": ([], "nothing found"),
    "points": ([(0.5, 0.25), (1, 0)], "0.5000 0.2500; 1.0000 0.0000"),
    "path": ("M 0 0 L 1 1 Z", "M 0 0 L 1 1 Z"),
}


@pytest.mark.parametrize("key", TEXTS)
def test_a_line_has_places_or_a_text_and_an_empty_one_is_called_so(
    watch, moondream_simulator, clip, key
):
    scripted, said = TEXTS[key]
    skill = SKILLS[key][1] if SKILLS[key] else "caption"
    getattr(moondream_simulator.script, skill)(scripted, times=None)
    status, lines, errors = watch(clip, "--every", "1m", *SKILLS[key])
    assert (status, errors) == (0, "")
    assert lines.rstrip().endswith(f"old: {said}")


def test_frames_are_as_far_apart_as_is_asked_for(watch, clip):
    _, said, _ = watch(clip, "--every", "200ms", "--json", "--in-flight", "2")
    asked = [json.loads(line)["time"] for line in said.splitlines()]
    # On a busy machine a frame may be superseded, but never the last one.
    assert asked in (times(clip)[::6], times(clip)[6::6])


def test_a_network_camera_is_watched(watch):
    photo = SAMPLE_IMAGE.read_bytes()

    async def play(peer):
        await peer.request_head()
        await peer.send(head("Content-Type: multipart/x-mixed-replace; boundary=f"))
        await peer.send(b"--f\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(photo), photo))

    with serving(play) as server:
        status, said, errors = watch(server.endpoint.removesuffix("/v1"))
    assert (status, errors) == (0, "")
    assert LINE.fullmatch(said.strip())


@pytest.mark.parametrize(
    ("arguments", "said_of_it"),
    [
        (["missing.mp4"], (1, "There is no file missing.mp4")),
        (["{folder}/no.mp4"], (1, "can't be read")),
        (["camera:97"], (1, "can't be read")),
        (["camera:x"], (2, "'camera:x' is no SOURCE")),
        (["ftp://127.0.0.1/clip.mp4"], (2, "is no SOURCE")),
        (["{clip}", "--skill", "detect"], (2, "'--skill detect' needs '--object'")),
        (["{clip}", "--skill", "query", "--question", " "], (2, "needs '--question'")),
        (["{clip}", "--object", "red"], (2, "'--object' is not for '--skill caption'")),
        (["{clip}", "--every", "soon"], (2, "'soon' is no time over 0")),
        (["{clip}", "--max-age", "0"], (2, "not over 0")),
        (["{clip}", "--in-flight", "0"], (2, "--in-flight")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_watched_is_one_line_and_nothing_is_asked(
    watch, moondream_simulator, clip, arguments, said_of_it
):
    (clip.parent / "no.mp4").write_bytes(b"no video")
    given = [each.format(folder=clip.parent, clip=clip) for each in arguments]
    status, said, errors = watch(*given)
    assert (status, said) == (said_of_it[0], "")
    assert said_of_it[1] in errors
    assert errors.count("\n") == 1
    assert moondream_simulator.requests == []


def test_a_missing_extra_is_told_before_anything_is_asked(
    watch, moondream_simulator, clip, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    status, said, errors = watch(clip)
    assert (status, said) == (1, "")
    assert "pip install 'moondream-async[video]'" in errors
    assert moondream_simulator.requests == []


def test_no_server_is_told_once_and_in_the_words_of_the_command_line(watch, clip, nobody):
    status, said, errors = watch(clip, "--endpoint", nobody)
    assert (status, said) == (1, "")
    assert "Is the server running?" in errors
    assert errors.count("\n") == 1


def test_frames_that_failed_are_told_and_the_next_is_asked_about(watch, clip, moondream_simulator):
    moondream_simulator.faults.append("status=500")
    status, said, errors = watch(clip, "--json")
    assert (status, errors) == (0, "")
    first, *_, last = map(json.loads, said.splitlines())
    assert first["error"]["type"] == "ServerError"
    assert last["caption"]


def test_a_watch_without_any_answer_fails_and_tells_why(watch, clip, moondream_simulator):
    moondream_simulator.faults.append("status=500,times=always")
    status, said, errors = watch(clip, "--every", "1m")
    assert (status, said) == (1, "")
    assert errors.startswith("0.000 s: ")
    assert "Simulated error 500" in errors


async def test_ctrl_c_ends_it(tmp_path, simulator):
    long = make_clip(tmp_path / "long.mp4", count=60, rate=1)
    command = ("moondream-async", "watch", long, "--skill", "detect", "--object", "red")
    async with running(*command, MOONDREAM_ENDPOINT=simulator.endpoint) as program:
        await program.until("s old")
        program.interrupt()
        status, _, errors = await program.end()
    assert (status, errors) == (130, [])
