"""Any picture in; upright, private, fitting bytes out."""

import base64
import io
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import types
import urllib.parse
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from pictures import (
    CLEAN,
    DISPLAY_P3,
    DRAWING,
    ICC,
    LINEAR,
    PHOTO,
    SECRET,
    SRGB,
    SRGB_CURVE,
    chunk,
    difference,
    exif,
    frames,
    make_drawing,
    make_photo,
    opened,
    profile,
    riff,
    save,
    segment,
    with_secrets,
)
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from moondream_async._images import can_prepare, encode_at_once, encode_image
from moondream_async.errors import ImageError, MissingExtraError, RequestError

# What goes in


FORMS = {
    "str": lambda data, path: str(path),
    "path": lambda data, path: path,
    "bytes": lambda data, path: data,
    "bytearray": lambda data, path: bytearray(data),
    "memoryview": lambda data, path: memoryview(data),
    "strided-memoryview": lambda data, path: memoryview(data[::-1])[::-1],
    "file": lambda data, path: io.BytesIO(data),
    "data-uri": lambda data, path: "data:image/jpeg;base64," + base64.b64encode(data).decode(),
    "without-padding": lambda data, path: (
        "DATA:;Base64," + base64.b64encode(data).decode().rstrip("=")
    ),
    "in-lines": lambda data, path: "data:;base64," + base64.encodebytes(data).decode(),
    "base64-percent-encoded": lambda data, path: (
        "data:;base64," + urllib.parse.quote(base64.b64encode(data))
    ),
    "percent-encoded": lambda data, path: "data:image/jpeg," + urllib.parse.quote_from_bytes(data),
}


@pytest.mark.parametrize("hand_in", FORMS.values(), ids=FORMS)
def test_same_bytes_come_out_whatever_they_come_in(hand_in, tmp_path):
    path = tmp_path / "photo.jpg"
    for length in (0, 1, 2, 200_000):  # of comments, which are cut out
        comments = [segment(0xFE, bytes(60_000))] * (length // 60_000)
        data = in_jpeg(*comments, segment(0xFE, bytes(length % 60_000)))
        path.write_bytes(data)
        result = encode_image(hand_in(data, path))
        assert result.data == CLEAN["jpeg"]
        assert (result.media_type, result.width, result.height) == ("image/jpeg", 96, 64)


def test_path_may_have_any_name_but_none(tmp_path):
    class Path:
        def __init__(self, name):
            self.name = name

        def __fspath__(self):
            if isinstance(self.name, Exception):
                raise self.name
            return self.name

    (tmp_path / "photo.png").write_bytes(CLEAN["png"])
    assert encode_image(Path(os.fsencode(tmp_path / "photo.png"))).data == CLEAN["png"]
    for nameless in (5, None, ZeroDivisionError()):
        with pytest.raises(ImageError, match="the Path can't be decoded"):
            encode_image(Path(nameless))


def test_file_is_read_from_where_it_stands_and_left_open(tmp_path):
    path = tmp_path / "archive"
    path.write_bytes(b"head" + CLEAN["png"])
    with path.open("rb") as file:
        file.seek(4)
        assert encode_image(file).data == CLEAN["png"]
        assert not file.closed


def test_encoded_image_is_encoded_anew_only_over_a_limit():
    image = encode_image(CLEAN["webp"])
    size = len(image.data)
    assert encode_image(image, max_pixels=96 * 64, max_bytes=size) is image
    assert encode_image(image, max_pixels=100).width == 12
    assert len(encode_image(image, max_bytes=size - 1).data) < size


def test_pillow_is_loaded_only_for_what_must_be_decoded(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(with_secrets("jpeg"))
    code = (
        "import sys; from moondream_async._images import encode_image;"
        "encode_image(sys.argv[1]); sys.exit('PIL' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "photo.jpg"], check=True)


def test_limit_that_is_no_positive_whole_number_is_refused():
    for limit in (0, -1, 1.5, "9"):
        for name in ("max_bytes", "max_pixels"):
            with pytest.raises(RequestError, match=f"{name} must be"):
                encode_image(CLEAN["png"], **{name: limit})


# numpy


@pytest.fixture
def np():
    return pytest.importorskip("numpy", reason="numpy is not installed")


def test_array_arrives_with_its_pixels(np):
    for mode, view in (
        ("L", lambda array: array),
        ("RGBA", lambda array: array[::-1, ::-1][::-1, ::-1]),
        ("RGB", lambda array: array.copy(order="F")),
    ):
        picture = make_drawing(110, 70).convert(mode)
        array = view(np.array(picture))
        before = array.copy()
        assert difference(opened(encode_image(array)), picture) == 0, mode
        assert (array == before).all()


def test_colours_in_opencvs_order_are_put_right(np):
    for picture in (make_drawing(2600, 1700), make_drawing(112, 72)):  # in strips, and at once
        frame = np.ascontiguousarray(np.array(picture)[:, :, ::-1])  # as OpenCV gives it
        assert difference(opened(encode_image(frame[:, :, ::-1])), picture) == 0
    half = picture.resize((56, 36), Image.Resampling.NEAREST)
    assert difference(opened(encode_image(frame[::2, ::2, ::-1])), half) == 0


def test_frame_that_is_made_smaller_shows_the_same(np):
    photo = make_photo(960, 540)
    for max_pixels in (475_000, 125_000, 25_000):  # with a factor of 1, 2 and 4
        result = opened(encode_image(np.array(photo), max_pixels=max_pixels))
        assert result.width * result.height <= max_pixels
        assert difference(result, photo.resize(result.size, Image.Resampling.LANCZOS)) < 24


def test_array_with_one_channel_is_grey_and_alpha_is_laid_on_white(np):
    array = np.arange(0, 240, dtype=np.uint8).reshape(12, 20, 1)
    assert difference(opened(encode_image(array)), Image.fromarray(array[:, :, 0])) == 0
    array = np.zeros((8, 8, 4), np.uint8)
    assert opened(encode_image(array)).getpixel((0, 0)) == (255, 255, 255)


def test_array_of_another_kind_is_refused_with_what_is_expected(np):
    for array, reason in [
        (np.zeros((8, 8, 3)), "uint8"),
        (np.zeros((8, 8), bool), "uint8"),
        (np.zeros((3, 8, 9), np.uint8), r"height, width.*\(3, 8, 9\)|\(3, 8, 9\).*height, width"),
        (np.zeros((8, 8, 2), np.uint8), "channels"),
        (np.zeros(8, np.uint8), "height, width"),
        (np.uint8(8), "height, width"),
        (np.zeros((0, 8), np.uint8), "no pixels"),
        (np.broadcast_to(np.uint8(0), (1 << 20, 1 << 20)), "too large"),
    ]:
        with pytest.raises(ImageError, match=reason):
            encode_image(array)


# What is sent as it is


def in_jpeg(*segments):
    return CLEAN["jpeg"][:2] + b"".join(segments) + CLEAN["jpeg"][2:]


def test_clean_file_goes_out_bit_for_bit_and_metadata_is_cut_out():
    for name, clean in CLEAN.items():
        assert encode_image(clean).data is clean, name
        data = with_secrets(name)
        assert SECRET in data
        result = encode_image(data)
        assert SECRET not in result.data, name
        assert b"51.5007N" not in result.data
        picture = opened(result)
        with Image.open(io.BytesIO(clean)) as expected:
            assert picture.tobytes() == expected.tobytes(), name
            assert picture.info.get("icc_profile") == expected.info.get("icc_profile")
        assert not picture.getexif()
        assert len(result.data) <= len(clean) + 18  # WebP may keep its extended header
        assert encode_image(result.data).data is result.data


def in_png(*chunks):
    return CLEAN["png"][:33] + b"".join(chunks) + CLEAN["png"][33:]


def in_picture_data(change, *, behind=b""):
    """The PNG with its compressed data changed, and with more chunks behind them."""
    data = CLEAN["png"]
    at = data.index(b"IDAT") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    return data[:at] + chunk(b"IDAT", change(data[at + 8 : end - 4])) + behind + data[end:]


def in_webp(name, tail):
    """The WebP with more bytes in the chunk of its picture."""
    data = CLEAN[name]
    kind = b"VP8L" if "lossless" in name else b"VP8 "
    at = data.index(kind)
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    chunks = data[12:at] + riff(kind, data[at + 8 : at + 8 + size] + tail)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


NINE = [SECRET[at : at + 9] for at in range(0, 36, 9)]
FIVES = [SECRET[at : at + 5] for at in range(0, 32, 2)]
LONGER = struct.pack(">I", len(ICC) + len(SECRET)) + ICC[4:] + SECRET  # no tag points to it
HIDING = {
    "png-end": CLEAN["png"][:-12] + chunk(b"IEND", SECRET),
    "png-pHYs": in_png(chunk(b"pHYs", bytes(9) + SECRET)),
    "png-gAMA": in_png(chunk(b"gAMA", bytes(4) + SECRET)),
    "png-sRGB": in_png(chunk(b"sRGB", b"\0" + SECRET)),
    "png-cHRM": in_png(chunk(b"cHRM", bytes(32) + SECRET)),
    "png-cICP": in_png(chunk(b"cICP", bytes(4) + SECRET)),
    "png-sBIT": in_png(chunk(b"sBIT", b"\x08\x08\x08" + SECRET)),
    "png-palette-in-rgb": in_png(chunk(b"PLTE", SECRET)),
    "png-pHYs-again": in_png(*(chunk(b"pHYs", piece) for piece in (bytes(9), *NINE))),
    "png-pHYs-late": in_picture_data(bytes, behind=chunk(b"pHYs", SECRET[:9])),
    "png-profile": in_png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(ICC) + SECRET)),
    "png-behind-profile": in_png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(ICC + SECRET, 0))),
    "png-in-profile": in_png(chunk(b"iCCP", b"icc\0\0" + zlib.compress(LONGER, 0))),
    "png-profile-name": in_png(chunk(b"iCCP", SECRET + b"\0\0" + zlib.compress(ICC))),
    "png-data": in_picture_data(lambda data: data + SECRET),
    "png-rows": in_picture_data(lambda data: zlib.compress(zlib.decompress(data) + SECRET, 0)),
    "png-more-data": in_picture_data(bytes, behind=chunk(b"IDAT", SECRET)),
    "png-second-run": in_picture_data(bytes, behind=chunk(b"tEXt", b"") + chunk(b"IDAT", SECRET)),
    "webp": in_webp("webp", SECRET),
    "webp-short": in_webp("webp", SECRET[:16]),
    "webp-lossless": in_webp("webp-lossless", SECRET),
    "gif": CLEAN["gif"][:-2] + bytes([len(SECRET)]) + SECRET + b"\0;",
    "jpeg-jfif": in_jpeg(
        segment(0xE0, b"JFIF\0\1\1" + bytes(7)), segment(0xE0, b"JFIF\0\1\1" + SECRET)
    ),
    "jpeg-adobe": in_jpeg(
        segment(0xEE, b"Adobe\0\x64" + bytes(4) + b"\1"), segment(0xEE, b"Adobe" + SECRET[:7])
    ),
    "jpeg-table": in_jpeg(segment(0xDB, b"\0" + SECRET.ljust(64, b"x"))),
    "jpeg-profile": in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + ICC + SECRET)),
    "jpeg-in-profile": in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + LONGER)),
    "jpeg-no-profile": in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + SECRET)),
    "jpeg-short-segment": in_jpeg(b"\xff\xec\0\0" + SECRET),
}


def test_nothing_hides_in_what_is_kept():
    for name, hiding in HIDING.items():
        result = encode_image(hiding)
        assert [piece for piece in FIVES if piece in result.data] == [], name
        clean = CLEAN["webp-lossless" if name == "webp-lossless" else name.partition("-")[0]]
        assert difference(opened(result), Image.open(io.BytesIO(clean))) <= 24, name
    data = with_secrets("webp")
    reserved = data.index(b"VP8X") + 9  # after the flags, and zero
    hiding = data[:reserved] + SECRET[:3] + data[reserved + 3 :]
    assert encode_image(hiding).data == encode_image(data).data


def test_metadata_is_gone_from_what_is_encoded_anew():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", SECRET.decode())
    files = {
        "JPEG": {"comment": SECRET, "exif": exif(3)},
        "PNG": {"pnginfo": info, "exif": exif(3)},
        "WEBP": {"exif": exif(3), "xmp": SECRET},
        "TIFF": {"tiffinfo": {270: SECRET.decode(), 274: 3}},
    }
    given = [save(PHOTO, kind, **options) for kind, options in files.items()]
    assert [SECRET in each for each in given] == [True] * 4
    picture = Image.open(io.BytesIO(given[0]))
    picture.info["xmp"] = SECRET
    for image in (*given, picture):
        for limits in ({}, {"max_pixels": 1000}):
            result = encode_image(image, **limits)
            assert SECRET not in result.data
            assert not opened(result).getexif()


def test_first_frame_of_an_animation_is_sent():
    for kind in ("GIF", "PNG", "WEBP"):
        data = frames(kind, **({"lossless": True} if kind == "WEBP" else {}))
        result = encode_image(data)
        assert result.media_type == f"image/{kind.lower()}"  # not decoded
        with Image.open(io.BytesIO(data)) as animation:
            assert animation.n_frames == 3
            assert difference(opened(result), animation) == 0
    at = data.index(b"ANMF") + 8  # and as it looks where it does not cover the canvas
    moved = data[:at] + b"\x04\0\0" + data[at + 3 :]  # eight pixels to the right
    at = moved.index(b"VP8X") + 12
    wide = moved[:at] + (PHOTO.width + 8 - 1).to_bytes(3, "little") + moved[at + 3 :]
    picture = opened(encode_image(wide))
    assert picture.width == PHOTO.width + 8
    assert difference(picture.crop((8, 0, *picture.size)), PHOTO) < 16


# What is converted


def grey(low, high):
    """A picture of mode F with a ramp from `low` to `high`."""
    ramp = Image.linear_gradient("L").resize((256, 64)).transpose(Image.Transpose.ROTATE_90)
    ramp = ramp.resize((64, 256)).convert("F")
    return ramp.point(lambda value: value * ((high - low) / 255) + low)


def wide(low, high, mode):
    return grey(low, high).convert("I").convert(mode)


def grey_row(*samples):
    return Image.frombytes("L", (len(samples), 1), bytes(samples))


def white_left_of(colour, size):
    picture = Image.new("L" if isinstance(colour, int) else "RGB", size, colour)
    picture.paste("white", (0, 0, size[0] // 2, size[1]))
    return picture


def raw_png(size, depth, colour, row, key):
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress((b"\0" + row) * size[1])
    chunks = [(b"IHDR", head), (b"tRNS", key), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def raw_tiff(bits, photometric, samples):
    """A TIFF of one row of grey samples, written as they are."""
    tags = [(256, 4, 2), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, 1), (279, 4, len(samples))]
    ifd = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(samples))
    return head + samples + struct.pack("<H", len(tags)) + ifd + bytes(4)


PNG_XMP = b"XML:com.adobe.xmp\0"
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
HEX = exif(6).tobytes().hex().encode()
RAW = b"\nexif\n    90\n" + b"\n".join(HEX[at : at + 72] for at in range(0, len(HEX), 72))
TURNED = PHOTO.transpose(Image.Transpose.ROTATE_270)
TO_LAB = ImageCms.buildTransform(
    ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
)
RAMP = grey(0, 255).convert("L")
LOOKS = {  # a picture, what it looks like, and the most that may differ
    "RGB": (DRAWING, DRAWING, 0),
    "RGBA": (DRAWING.convert("RGBA"), DRAWING, 0),
    "RGBa": (DRAWING.convert("RGBA").convert("RGBa"), DRAWING, 0),
    "RGBX": (DRAWING.convert("RGBX"), DRAWING, 0),
    "CMYK": (DRAWING.convert("CMYK"), DRAWING, 1),
    "YCbCr": (DRAWING.convert("YCbCr"), DRAWING, 2),
    "HSV": (DRAWING.convert("HSV"), DRAWING, 8),
    "LAB": (TO_LAB.apply(DRAWING), DRAWING, 23),
    "L": (DRAWING.convert("L"), DRAWING.convert("L"), 0),
    "1": (DRAWING.convert("1"), DRAWING.convert("1"), 0),
    "LA": (DRAWING.convert("LA"), DRAWING.convert("L"), 0),
    "La": (DRAWING.convert("LA").convert("La"), DRAWING.convert("L"), 0),
    "P": (DRAWING.quantize(8), DRAWING, 0),
    "PA": (DRAWING.quantize(8).convert("PA"), DRAWING, 0),
    "I;16": (wide(0, 65535, "I;16"), RAMP, 1),
    "I;16B": (wide(0, 65535, "I;16B"), RAMP, 1),
    "I-8-bits": (wide(0, 255, "I"), RAMP, 1),
    "I-16-bits": (wide(0, 65535, "I"), RAMP, 1),
    "I-stretched": (wide(-70000, 1000000, "I"), RAMP, 2),
    "F-8-bits": (grey(0, 255), RAMP, 1),
    "F-fractions": (grey(0, 1), RAMP, 1),
    "F-stretched": (grey(-1, 1), RAMP, 2),
    "F-flat": (Image.new("F", (8, 8), 1e30), Image.new("L", (8, 8), 0), 0),
    # A TIFF of any depth; in the last two, white is 0.
    "tiff-12-bits": (raw_tiff(12, 1, b"\xff\xf8\x00"), grey_row(255, 128), 0),
    "tiff-16-bits": (raw_tiff(16, 1, b"\xff\xff\x80\x80"), grey_row(255, 128), 0),
    "tiff-16-white": (raw_tiff(16, 0, b"\xff\xff\x7f\x7f"), grey_row(0, 128), 0),
    "tiff-8-white": (raw_tiff(8, 0, b"\xff\x7f"), grey_row(0, 128), 0),
    # Only the colour that stands for nothing is white.
    "key-1": (raw_png((16, 4), 1, 0, b"\xff\0", b"\0\1"), white_left_of(0, (16, 4)), 0),
    "key-2": (raw_png((8, 4), 2, 0, b"\x55\xaa", b"\0\1"), white_left_of(170, (8, 4)), 0),
    "key-4": (raw_png((4, 4), 4, 0, b"\x11\xee", b"\0\1"), white_left_of(238, (4, 4)), 0),
    "key-8": (raw_png((2, 4), 8, 0, b"\x07\x80", b"\0\7"), white_left_of(128, (2, 4)), 0),
    "key-16": (raw_png((2, 4), 16, 0, b"\7\7\x80\x80", b"\7\7"), white_left_of(128, (2, 4)), 0),
    "key-16-rgb": (
        raw_png((2, 4), 16, 2, b"\1\2\3\4\5\6" + b"\x80\0" * 3, b"\1\2\3\4\5\6"),
        white_left_of((128,) * 3, (2, 4)),
        0,
    ),
    # The orientation may stand elsewhere.
    "xmp-jpeg": (in_jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)), TURNED, 47),
    "xmp-png": (in_png(chunk(b"iTXt", PNG_XMP + b"\0\0\0\0" + XMP)), TURNED, 47),
    "xmp-packed": (in_png(chunk(b"iTXt", PNG_XMP + b"\1\0\0\0" + zlib.compress(XMP))), TURNED, 47),
    "xmp-webp": (save(PHOTO, "WEBP", xmp=XMP), TURNED, 47),
    "xmp-tiff": (save(PHOTO, "TIFF", tiffinfo={700: XMP}), TURNED, 47),
    "exif-as-text": (in_png(chunk(b"tEXt", b"Raw profile type APP1\0" + RAW)), TURNED, 47),
    "exif-packed": (
        in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW))),
        TURNED,
        47,
    ),
}


def test_picture_arrives_as_it_looks():
    for name, (given, expected, tolerance) in LOOKS.items():
        before = given.copy() if isinstance(given, Image.Image) else given
        result = opened(encode_image(given))
        assert result.mode in ("L", "RGB", "1")
        assert difference(result, expected) <= tolerance, name
        assert given == before  # with its mode, size and info


def test_pixels_that_are_not_numbers_are_refused():
    with pytest.raises(ImageError, match="finite"):
        encode_image(Image.new("F", (8, 8), math.inf))


MISREAD = {
    "jpeg-cmyk": save(DRAWING.convert("CMYK"), "JPEG", quality=98),
    "png-palette": save(DRAWING.quantize(8), "PNG"),
    "png-alpha": save(DRAWING.convert("RGBA"), "PNG"),
    "png-colour-key": save(DRAWING, "PNG", transparency=(1, 2, 3)),
    "gif-transparent": save(DRAWING.quantize(8), "GIF", transparency=7),
    "bmp": save(DRAWING, "BMP"),
    "tiff": save(DRAWING, "TIFF", compression="tiff_lzw"),
    "ppm": save(DRAWING, "PPM"),
    "tga": save(DRAWING, "TGA"),
    "jpeg-2000": save(DRAWING, "JPEG2000"),
}


def test_file_that_servers_may_misread_is_converted():
    small, nearest = (48, 32), Image.Resampling.NEAREST
    for name, data in MISREAD.items():
        result = encode_image(data)
        assert result.data != data, name
        picture = opened(result)
        assert picture.mode == "RGB"
        assert difference(picture.resize(small, nearest), DRAWING.resize(small, nearest)) <= 24


def test_avif_is_converted():
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow knows no AVIF")
    data = save(DRAWING, "AVIF", quality=100, subsampling="4:4:4", exif=exif(6))
    picture = opened(encode_image(data))
    assert difference(picture, DRAWING.transpose(Image.Transpose.ROTATE_270)) < 24


def test_transparency_is_laid_on_white():
    there = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    there.paste((200, 0, 0, 255), (0, 0, 32, 48))
    palette = there.convert("P").convert("PA")
    palette.putalpha(there.getchannel("A"))
    for picture in (*(there.convert(mode) for mode in ("LA", "RGBA", "RGBa")), palette):
        result = opened(encode_image(picture)).convert("RGB")
        assert result.getpixel((60, 20)) == (255, 255, 255), picture.mode
        assert result.getpixel((3, 20)) != (255, 255, 255), picture.mode
    half = opened(encode_image(Image.new("RGBA", (16, 16), (0, 0, 0, 51))))
    assert half.getpixel((5, 5)) == (204, 204, 204)


def test_first_frame_that_is_smaller_than_its_gif_has_nothing_around_it():
    red = Image.new("P", (10, 8), 1)
    red.putpalette([0, 0, 0, 200, 0, 0])
    data = save(red, "GIF")
    at = data.index(b",") + 1
    data = data[:6] + struct.pack("<HH", 30, 20) + data[10:at] + b"\5\0\6\0" + data[at + 4 :]
    picture = opened(encode_image(data)).convert("RGB")
    assert picture.size == (30, 20)
    assert picture.getpixel((5, 6)) == picture.getpixel((14, 13)) == (200, 0, 0)
    for place in ((0, 0), (4, 6), (15, 13), (29, 19)):
        assert picture.getpixel(place) == (255, 255, 255)


def test_icc_profile_is_applied_when_encoding_anew():
    plain = Image.new("RGB", (64, 48), (255, 0, 0))
    for red in (plain, plain.convert("RGBA"), plain.quantize(2)):
        red.info["icc_profile"] = ICC  # in which that is green
        picture = opened(encode_image(red))
        assert "icc_profile" not in picture.info
        assert difference(picture, Image.new("RGB", (64, 48), (0, 255, 0))) < 8, red.mode
    for broken in (b"", b"\0", ICC[:200], b"x" * 500):  # is passed over
        picture = DRAWING.copy()
        picture.info["icc_profile"] = broken
        assert difference(opened(encode_image(picture)), DRAWING) == 0


GREY = profile("grey", None, LINEAR)
WIDE = profile("Display P3 Gamut with sRGB Transfer", DISPLAY_P3, SRGB_CURVE)
JUDGED = {
    "wide-gamut-named-srgb": ("RGB", (200, 100, 50), WIDE, (215, 93, 31)),
    "linear-named-srgb": ("RGB", (128,) * 3, profile("GIMP sRGB", SRGB, LINEAR), (188,) * 3),
    "srgb": ("RGB", (200, 100, 50), profile("?", SRGB, SRGB_CURVE), (200, 100, 50)),
    "grey": ("L", 128, GREY, 188),
    "grey-16-bits": ("I;16", 32896, GREY, 188),
    "grey-alpha": ("LA", (128, 255), GREY, 188),
    "grey-half-alpha": ("LA", (128, 128), GREY, 221),
    "grey-with-colours'-profile": ("L", 128, ICC, 128),
}


def test_icc_profile_is_judged_by_what_it_does():
    for name, (mode, colour, icc, expected) in JUDGED.items():
        picture = Image.new(mode, (16, 16), colour)
        picture.info["icc_profile"] = icc
        assert opened(encode_image(picture)).getpixel((3, 3)) == expected, name
        if mode == "RGB":
            continue
        sent = opened(encode_image(save(picture, "PNG", icc_profile=icc)))
        if mode == "L":
            assert sent.info["icc_profile"] == icc  # sent as it is
        else:
            assert sent.getpixel((3, 3)) == expected, name


def test_drawing_goes_lossless_and_photo_as_a_good_jpeg():
    for size in ((64, 48), (1600, 1200), (60, 4000)):
        assert encode_image(make_drawing(*size)).media_type == "image/png"
    for size in ((160, 120), (1600, 1200)):
        result = encode_image(make_photo(*size))
        assert result.media_type == "image/jpeg"
        assert difference(opened(result), make_photo(*size)) <= 8


# Upright


def test_picture_is_sent_upright():
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            tags = (
                {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif(orientation)}
            )
            data = save(DRAWING, kind, quality=95, **tags)
            lazy = Image.open(io.BytesIO(data))
            upright = ImageOps.exif_transpose(lazy)
            for image in (data, lazy):
                assert difference(opened(encode_image(image)), upright) < 24, (kind, orientation)


def test_orientation_is_read_however_it_is_written():
    for order, head in (("<", b"II*\0"), (">", b"MM\0*")):
        for kind, value in ((3, struct.pack(order + "HH", 6, 0)), (4, struct.pack(order + "I", 6))):
            ifd = struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value
            result = encode_image(in_jpeg(segment(0xE1, b"Exif\0\0" + head + ifd)))
            assert (result.width, result.height) == (64, 96), (order, kind)


def test_exif_is_believed_before_xmp_and_an_orientation_that_means_nothing_is_passed_over():
    assert encode_image(save(PHOTO, "JPEG", exif=exif(1), xmp=XMP)).data == CLEAN["jpeg"]
    for orientation in (0, 9, 65535):
        assert encode_image(save(PHOTO, "JPEG", exif=exif(orientation))).data == CLEAN["jpeg"]


# Pillow images


def test_lazily_opened_picture_works_and_stays_usable(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(CLEAN["png"])
    with Image.open(path) as picture:
        result = encode_image(picture)
        assert picture.convert("RGB").tobytes() == PHOTO.tobytes()
    assert difference(opened(result), PHOTO) < 16
    unread = Image.open(path)
    unread.close()
    with pytest.raises(ImageError):
        encode_image(unread)


def test_one_lazily_opened_picture_may_be_encoded_in_many_threads_at_once():
    picture = Image.open(io.BytesIO(save(make_photo(400, 300), "PNG")))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: encode_image(picture).data, range(16)))
    assert set(results) == {encode_image(make_photo(400, 300)).data}


def test_current_frame_of_a_pillow_image_is_taken():
    with Image.open(io.BytesIO(frames("PNG"))) as animation:
        animation.seek(2)
        assert difference(opened(encode_image(animation)), DRAWING) < 16
        assert animation.tell() == 2


# Limits


def test_max_pixels_is_kept():
    for name in ("jpeg", "jpeg-progressive", "png", "gif", "webp"):
        for max_pixels in (1, 1000, 6143, 6144):
            result = encode_image(CLEAN[name], max_pixels=max_pixels)
            assert result.width * result.height <= max_pixels, name
            opened(result)
            assert (result.data is CLEAN[name]) == (max_pixels == 6144)
            if max_pixels > 1:
                assert result.width / result.height == pytest.approx(1.5, rel=0.15)
    for size in ((1, 5000), (5000, 1), (2, 5000)):
        for max_pixels in (1, 100, 2000):
            picture = opened(encode_image(Image.new("RGB", size), max_pixels=max_pixels))
            assert picture.width * picture.height <= max_pixels, size


def test_smaller_picture_shows_the_same():
    photo = make_photo(800, 600)
    expected = photo.resize((200, 150), Image.Resampling.LANCZOS)
    for picture in (photo, save(photo, "JPEG", quality=95), save(photo, "PNG")):
        result = opened(encode_image(picture, max_pixels=200 * 150))
        assert result.size == (200, 150)
        assert difference(result, expected) < 24


def test_max_bytes_is_kept():
    noise = Image.frombytes("RGB", (200, 150), random.Random(1).randbytes(200 * 150 * 3))
    for picture in (noise, save(noise, "PNG"), save(noise, "JPEG", quality=98), save(noise, "BMP")):
        for limit in (30_000, 10_000, 1_000):
            result = encode_image(picture, max_bytes=limit)
            assert len(result.data) <= limit
            assert opened(result).width / result.height == pytest.approx(4 / 3, rel=0.2)


def test_quality_goes_before_pixels_and_neither_without_need():
    photo = make_photo(640, 480)
    best = encode_image(photo)
    assert encode_image(photo, max_bytes=len(best.data)).data == best.data
    less = encode_image(photo, max_bytes=len(best.data) - 1)
    assert (less.width, less.height) == (640, 480)
    assert len(less.data) > len(best.data) / 2


def test_metadata_does_not_count_against_max_bytes_and_what_nothing_fits_is_an_error():
    data = CLEAN["jpeg"]
    heavy = in_jpeg(segment(0xFE, bytes(60_000)))
    assert encode_image(heavy, max_bytes=len(data)).data == data
    with pytest.raises(ImageError, match="100 bytes"):
        encode_image(data, max_bytes=100)


def test_side_longer_than_jpeg_allows_is_shortened():
    for size in ((1, 70_000), (70_000, 3)):
        assert max(opened(encode_image(Image.effect_noise(size, 90))).size) <= 65_500


def test_picture_is_told_while_another_thread_loads_pillow(monkeypatch, photo):
    monkeypatch.setitem(sys.modules, "PIL.Image", types.ModuleType("PIL.Image"))
    assert encode_image(photo).media_type == "image/jpeg"


SMALL = Image.new("RGB", (40, 30), "teal")


def test_small_file_is_prepared_at_once_as_it_would_be_in_a_thread():
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        data = save(SMALL, kind)
        ready, expected = encode_at_once(data), encode_image(data)
        assert (ready.data, ready.media_type) == (expected.data, expected.media_type)
        assert (ready.width, ready.height) == (40, 30)


def test_what_takes_a_while_or_fails_is_not_prepared_at_once():
    png, jpeg = save(SMALL, "PNG"), save(SMALL, "JPEG")
    to_be_decoded, cut_short, not_small = save(SMALL, "BMP"), png[:-20], jpeg + bytes(20_000)
    for image in (to_be_decoded, cut_short, not_small, b"", "photo.jpg"):
        assert encode_at_once(image) is None
    assert encode_at_once(png, max_pixels=1199) is None
    assert encode_at_once(png, max_pixels=1200) is not None


# HEIC


def heic(picture, **options):
    """The picture as an iPhone would write it."""
    heif = pytest.importorskip("pillow_heif", reason="the extra heif is not installed")
    file = io.BytesIO()
    heif.from_pillow(picture).save(file, quality=95, **options)
    return file.getvalue()


def test_heic_is_converted_and_pillow_stays_as_it_was():
    data = heic(DRAWING.resize((480, 320)), exif=exif(6).tobytes())
    result = encode_image(data)
    assert SECRET not in result.data
    upright = DRAWING.transpose(Image.Transpose.ROTATE_270).resize((320, 480))
    assert difference(opened(result).reduce(10), upright.reduce(10)) < 24
    assert "HEIF" not in Image.OPEN
    assert encode_image(data, max_pixels=10_000).height == 122


def test_heic_without_its_extra_is_refused_and_the_extra_named(monkeypatch):
    data = heic(DRAWING)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for kind in (ImageError, MissingExtraError):
        with pytest.raises(kind, match=r"pip install 'moondream-async\[heif\]'") as caught:
            encode_image(data)
        assert type(pickle.loads(pickle.dumps(caught.value))) is type(caught.value)


def test_name_tells_what_can_be_prepared(monkeypatch):
    known = {"a.JPG": True, "a.tiff": True, "a.psd": False, "a.txt": None, "jpg": None}
    assert {name: can_prepare(name) for name in known} == known
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "pillow_heif" or None)
    assert can_prepare("a.HEIC") is True
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert can_prepare("a.HEIC") is False
