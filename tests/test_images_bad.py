"""What is no picture, or a broken one, is an ImageError: in bounded time, whatever the bytes."""

import io
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import (
    CLEAN,
    PHOTO,
    chunk,
    difference,
    exif,
    frames,
    jpeg_of,
    opened,
    png_head,
    save,
    segment,
    with_secrets,
)
from PIL import Image

from moondream_async._images import decode_image, encode_image
from moondream_async.errors import ImageError

# What is no picture


class AsyncFile:
    name = "upload.jpg"

    async def read(self, size=-1):
        return b""


class Unreadable:
    def read(self, size=-1):
        raise OSError("the disk is gone")


class Endless:
    def read(self, size):
        return bytes(size)


CLOSED_FILE = io.BytesIO(CLEAN["png"])
CLOSED_FILE.close()
RELEASED_VIEW = memoryview(CLEAN["png"])
RELEASED_VIEW.release()
NO_PICTURES = [
    (b"", "is empty"),
    (io.BytesIO(), "is empty"),
    ("data:,", "is empty"),
    (b"<!DOCTYPE html><html>", "not a picture"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    (save(PHOTO, "DDS"), "not a picture"),
    ("missing.jpg", "'missing.jpg' does not exist"),
    ("", "does not exist"),
    (".", "is a directory"),
    ("a\0b", "can't be opened"),
    ("/9j/" + "A" * 100_000, r"\(100004 characters\)"),
    ("huge.jpg", r"huge\.jpg' is too large: 256,000,001 bytes"),
    ("https://example.com/a.jpg", r"fetch_image\(url\)"),
    ("HTTP://example.com/a.jpg", r"fetch_image\(url\)"),
    ("data:image/png;base64", "no comma"),
    ("data:;base64,iVBO!!!!", "malformed"),
    ("data:;base64,iVBOR", "malformed"),
    ("data:;base64,iV==BORw", "malformed"),
    ("data:image/png,\u20ac", "malformed"),
    (None, "not NoneType"),
    (7, "not int"),
    (io.StringIO("text"), "mode 'rb'"),
    (AsyncFile(), "'upload.jpg' is an async file"),
    (Unreadable(), "the disk is gone"),
    (Endless(), "too large"),
    (CLOSED_FILE, "can't be read"),
    (RELEASED_VIEW, "can't be read"),
    (Image.new("RGB", (0, 9)), "no pixels"),
    (b"\xff\xd8\xff\xd9", "a JPEG without a picture in it"),
    (png_head(0, 8, 2), "no pixels"),
    (jpeg_of(0, 8), "no pixels"),
]


def test_what_is_no_picture_is_refused_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with Path("huge.jpg").open("wb") as file:
        file.truncate(256_000_001)  # a hole; takes no space
    for image, reason in NO_PICTURES:
        with pytest.raises(ImageError, match=reason) as caught:
            encode_image(image)
        assert len(str(caught.value)) < 400


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no /dev/zero")
def test_fifo_and_device_are_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ImageError, match=f"{path}' is not a regular file"):
            encode_image(path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no users")
def test_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(CLEAN["png"])
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody's, since root may read all
    try:
        with pytest.raises(ImageError, match="permission"):
            encode_image(path)
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", [*CLEAN, "tiff", "bmp"])
def test_truncated_file_is_refused_unless_only_its_end_mark_is_missing(name):
    data = CLEAN.get(name) or save(PHOTO, name.upper())
    mark = 16 if name.startswith("png") else {"gif": 1, "jpeg": 2}.get(name.partition("-")[0], 0)
    end = len(data) - mark  # of a PNG, IEND and what checks the data
    for length in {*range(min(end, 64)), *range(0, end, 23), *range(end - 30, end)}:
        with pytest.raises(ImageError):
            encode_image(data[:length])
    for length in range(end, len(data)):
        picture = opened(encode_image(data[:length]))
        if name.startswith("jpeg"):  # encoded anew
            assert difference(picture, decode_image(data)) <= 16
        else:
            assert picture.tobytes() == Image.open(io.BytesIO(data)).tobytes()


def damaged_chunk(kind, body):
    return chunk(kind, body)[:-4] + b"\0\0\0\0"


def between_segments(stray):
    """The JPEG with bytes before its first table, where only a marker may be."""
    at = CLEAN["jpeg"].index(b"\xff\xdb")
    return CLEAN["jpeg"][:at] + stray + CLEAN["jpeg"][at:]


def in_png(*chunks):
    return CLEAN["png"][:33] + b"".join(chunks) + CLEAN["png"][33:]


DAMAGED = {
    "jpeg-stray": between_segments(b"stray bytes"),
    "jpeg-zeros": between_segments(bytes(500)),
    "jpeg-ff00": between_segments(b"\xff\0"),
    "jpeg-length-0": between_segments(b"\xff\xe5\0\0"),
    "jpeg-length-1": between_segments(b"\xff\xe5\0\1"),
    "jpeg-too-short": between_segments(b"\xff\xfe\0\4four and more"),
    "jpeg-segment-of-zeros": between_segments(segment(0xE1, bytes(40))),
    "png-text": in_png(damaged_chunk(b"tEXt", b"a\0b")),
    "png-gamma": in_png(damaged_chunk(b"gAMA", bytes(4))),
    "png-behind": CLEAN["png"][:-12] + damaged_chunk(b"tIME", bytes(7)) + CLEAN["png"][-12:],
    "png-end": CLEAN["png"][:-4] + bytes(4),
    "png-cut-in-text": CLEAN["png"][:-12] + chunk(b"tEXt", b"a\0b")[:-5],
}


def test_picture_that_viewers_show_though_it_is_damaged_is_sent():
    for name, data in DAMAGED.items():
        kind, tolerance = ("jpeg", 16) if name.startswith("jpeg") else ("png", 0)
        picture = opened(encode_image(data))
        assert difference(picture, Image.open(io.BytesIO(CLEAN[kind]))) <= tolerance, name


def test_damaged_png_is_told_by_its_checksum():
    data = bytearray(CLEAN["png"])
    data[len(data) // 2] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        encode_image(bytes(data))


def test_animation_of_thousands_of_frames_costs_no_more_than_its_first():
    data = frames("GIF")
    many = data[:-1] + data[data.index(b"!\xf9", 800) : -1] * 3000 + b";"
    assert encode_image(many).data == encode_image(data).data


def test_cause_of_a_failure_is_chained():
    with pytest.raises(ImageError) as caught:
        encode_image("missing.jpg")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ImageError) as caught:
        encode_image(save(PHOTO, "TIFF")[:500])
    assert isinstance(caught.value.__cause__, OSError)


# Anything at all

ALL = {
    **CLEAN,
    **{f"{name}-secret": with_secrets(name) for name in CLEAN},
    "jpeg-turned": save(PHOTO, "JPEG", exif=exif(6)),
    "jpeg-cmyk": save(PHOTO.convert("CMYK"), "JPEG"),
    "png-palette": save(PHOTO.quantize(16), "PNG", transparency=3),
    "png-animated": frames("PNG"),
    "gif-animated": frames("GIF"),
    "webp-animated": frames("WEBP"),
    "tiff": save(PHOTO, "TIFF"),
    "bmp": save(PHOTO, "BMP"),
    "ico": save(PHOTO, "ICO"),
    "jpeg-2000": save(PHOTO, "JPEG2000"),
}
MAGIC = sorted({data[:length] for data in ALL.values() for length in (4, 8, 12, 16)})
# Compressed data are not decoded on the way through, and GIF and WebP have no
# checksum over them: what is promised for those is what their container holds.
CONTAINER_BYTES = {"gif": 13, "webp": 20}


def check(data):
    """Whatever goes in: an `ImageError` comes out, or a picture that opens and decodes."""
    try:
        result = encode_image(data)
    except ImageError:
        return
    opened(result)


@given(st.sampled_from(MAGIC), st.binary(max_size=300))
@example(b"", b"")
@example(CLEAN["jpeg"].replace(b"\xff\xda\0\x0c\3\1", b"\xff\xda\0\x0c\3\2"), b"")  # 2, 2, 3
@example(CLEAN["jpeg"][:2], segment(0xC4, b"\0\0\1" + bytes(14) + b"\x10") + CLEAN["jpeg"][2:])
def test_random_bytes_give_a_picture_or_an_image_error(magic, rest):
    check(magic + rest)


@given(st.data())
@settings(max_examples=3 * settings.default.max_examples)
def test_mutated_header_gives_a_picture_or_an_image_error(data):
    name = data.draw(st.sampled_from(sorted(ALL)))
    mutated = bytearray(ALL[name][: data.draw(st.none() | st.integers(0, len(ALL[name])))])
    head = CONTAINER_BYTES.get(name.partition("-")[0], 800)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(head, len(mutated))))
        count = data.draw(st.integers(0, 3))
        mutated[at : at + count] = data.draw(st.binary(min_size=0, max_size=3))
    check(bytes(mutated))


@given(st.sampled_from(sorted(ALL)), st.integers(1, 10_000), st.integers(700, 10_000))
def test_any_picture_fits_any_limits(name, max_pixels, max_bytes):
    result = encode_image(ALL[name], max_pixels=max_pixels, max_bytes=max_bytes)
    assert result.width * result.height <= max_pixels
    assert len(result.data) <= max_bytes
    opened(result)
