"""Where moving pictures come from: each frame once or the newest, and devices let go of."""

import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_server import GoneError, RawServer, head, in_chunks, whole

import moondream_async as md
from moondream_async import frames
from moondream_async._protocol.mjpeg import MJPEGParser
from moondream_async.simulator import SAMPLE_IMAGE

av = pytest.importorskip("av", reason="the extra video is not installed")
pytest.importorskip("mss", reason="the extra video is not installed")
from mss.screenshot import ScreenShot  # noqa: E402 - needs it
from pictures_moving import make_clip, times  # noqa: E402 - likewise


@pytest.fixture
def clip(tmp_path):
    """Ninety frames, three seconds, of a colour that grows."""
    return make_clip(tmp_path / "clip.mp4")


def threads():
    return [each for each in threading.enumerate() if each.name == "moondream_async source"]


@pytest.mark.parametrize(
    ("arguments", "step"), [({}, 1), ({"every": 0.5}, 15), ({"fps": 10}, 3)], ids=str
)
async def test_a_file_gives_each_frame_once_with_its_own_time(clip, arguments, step):
    async with frames.video(clip, **arguments) as source:
        found = [each async for each in source]
    assert [each.time for each in found] == times(clip)[::step]
    assert [each.index for each in found] == list(range(len(found)))
    assert {each.image.shape for each in found} == {(48, 64, 3)}
    assert abs(int(found[-1].image[0, 0, 0]) - 2 * (len(found) - 1) * step) < 12  # red comes first
    assert threads() == []


async def test_only_key_frames_are_given_where_that_is_asked_for(clip):
    with av.open(str(clip)) as container:
        expected = [each.time for each in container.decode(video=0) if each.key_frame]
    async with frames.video(clip, keyframes=True) as source:
        assert [each.time async for each in source] == expected
    assert 1 < len(expected) < 90


async def test_a_video_may_come_from_the_web(clip):
    async def play(peer):
        with contextlib.suppress(GoneError):
            while True:  # FFmpeg looks at the end of the file, too
                await peer.request_head()
                await peer.send(whole(clip.read_bytes(), kind="video/mp4"))

    async with RawServer(play) as server:
        async with frames.video(f"{server.origin}/clip.mp4") as source:
            assert [each.time async for each in source] == times(clip)
        await server.until_idle()


async def test_leaving_in_the_middle_ends_the_thread(clip):
    async with frames.video(clip) as source:
        await anext(source)
    assert threads() == []
    with pytest.raises(StopAsyncIteration):
        await anext(source)


async def test_a_camera_gives_the_newest_frame(client):
    """A generator of pictures stands in for the device: a real one is no part of a test's room."""
    pattern = frames.video("testsrc=size=64x48:rate=200", format="lavfi", live=True)
    async with pattern as source, client.watch(source, "caption") as watch:
        seen = [(await anext(watch)).frame.index for _ in range(3)]
    assert seen == sorted(set(seen))
    assert threads() == []


@pytest.mark.parametrize(
    "source", ["missing.mp4", b"no video", "camera"], ids=["missing", "other", "no camera"]
)
async def test_what_cannot_be_opened_is_an_error_of_ours(tmp_path, source):
    if source == "camera":
        opened = frames.camera(97)
    elif isinstance(source, bytes):
        (tmp_path / "clip.mp4").write_bytes(source)
        opened = frames.video(tmp_path / "clip.mp4")
    else:
        opened = frames.video(tmp_path / source)
    with pytest.raises(md.ImageError):
        await opened.__aenter__()
    assert threads() == []


def test_what_is_taken_of_the_screen_is_an_rgb_array():
    shot = ScreenShot(bytearray([3, 2, 1, 255] * 6), {"left": 0, "top": 0, "width": 3, "height": 2})
    array = frames.rgb(shot)
    assert array.tolist() == [[[1, 2, 3]] * 3] * 2
    assert array.flags.c_contiguous


@pytest.mark.parametrize("arguments", [{"every": 0}, {"fps": -1}, {"every": 1, "keyframes": True}])
def test_an_argument_that_cannot_be_right_is_refused(arguments):
    with pytest.raises(md.RequestError):
        frames.video("clip.mp4", **arguments)


# -- Motion JPEG ------------------------------------------------------------------------------

PICTURES = [b"\xff\xd8\xff" + bytes([number]) * (5 + number) for number in range(4)]
STREAMS = {
    "lengths": b"".join(
        b"--f\r\nContent-Length: %d\r\nX-Timestamp: 7\r\n\r\n%b\r\n" % (len(each), each)
        for each in PICTURES
    ),
    "no lengths": b"".join(b"--f\r\nA: b\r\n\r\n%b\r\n" % each for each in PICTURES) + b"--f--",
    "bare line ends": b"".join(b"--f\nA: b\n\n%b\n" % each for each in PICTURES) + b"--f\n",
    "dashes": b"".join(b"----f\r\nA: b\r\n\r\n%b\r\n" % each for each in PICTURES) + b"----f--",
}
STREAMS["an empty part"] = b"--f\r\nA: b\r\n\r\n" + STREAMS["no lengths"]


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
@given(boundary=st.sampled_from(["f", "--f", '"f"']), data=st.data())
def test_pictures_are_found_wherever_the_bytes_are_cut(stream, boundary, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)), max_size=6)))
    parser = MJPEGParser(boundary)
    found = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += parser.feed(stream[begin:end])
    assert found == PICTURES


@pytest.mark.parametrize(
    "part",
    [
        b"Content-Length: 51\r\n\r\n",
        b"Content-Length: 9999999999\r\n\r\n",
        b"A: b\r\n\r\n" + b"x" * 99,
    ],
    ids=["says so", "says much", "is"],
)
def test_a_picture_that_is_too_large_or_says_so_is_not_waited_for(part):
    with pytest.raises(md.ImageError, match="over 50 bytes"):
        MJPEGParser("f", max_image_bytes=50).feed(b"--f\r\n" + part)


@given(st.lists(st.binary() | st.sampled_from([b"--f\r\n", b"\r\n\r\n", b"\xff\xd8\xff"])))
def test_whatever_a_camera_sends_is_pictures_or_one_error(pieces):
    parser = MJPEGParser("f", max_image_bytes=50)
    try:
        found = [each for piece in pieces for each in parser.feed(piece)]
    except md.ImageError:
        return
    assert all(each.startswith(b"\xff\xd8\xff") for each in found)


@pytest.mark.parametrize("chunked", [False, True], ids=["until it closes", "in chunks"])
async def test_a_network_camera_is_watched(client, chunked):
    photo = SAMPLE_IMAGE.read_bytes()
    part = b"--f\r\nContent-Length: %d\r\n\r\n%b\r\n" % (len(photo), photo)
    kind = "Content-Type: multipart/x-mixed-replace; boundary=f"

    async def play(peer):
        await peer.request_head()
        await peer.send(head(kind, *(["Transfer-Encoding: chunked"] if chunked else [])))
        await peer.send(in_chunks(part, part, end=False) if chunked else part + part)
        await peer.until_gone()

    async with RawServer(play) as server:
        async with frames.mjpeg(server.origin) as source, client.watch(source) as watch:
            each = await anext(watch)
            assert each.frame.image == photo
            assert each.ok
        await server.until_idle()
