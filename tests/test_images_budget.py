"""One picture costs a worker no more than its share, whatever is in the file."""

import functools
import io
import logging
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import pytest
from pictures import CLEAN, PHOTO, chunk, exif, jpeg_of, opened, png_head, riff, save, segment
from PIL import Image, ImageFile

from moondream_async._images import decode_image, encode_image
from moondream_async.errors import ImageError
from moondream_async.simulator.pixels import measure

SIDE = 9_400  # squared, it is just within what is opened at all


def png(width, height, colour):
    """A PNG of zeros; colour type 2 has three samples a pixel, 6 has four."""
    row = bytes(1 + width * (3 if colour == 2 else 4))
    rows = max(1, (1 << 20) // len(row))
    packer = zlib.compressobj(1)
    data = [packer.compress(row * min(rows, height - at)) for at in range(0, height, rows)]
    return png_head(width, height, colour, b"".join([*data, packer.flush()]))


def lossless_webp():
    """46 bytes that are 88 million transparent pixels."""
    small = save(Image.new("RGBA", (8, 8)), "WEBP", lossless=True)
    at = small.index(b"VP8L") + 9
    bits = int.from_bytes(small[at : at + 4], "little") >> 28 << 28
    bits |= (SIDE - 1) | (SIDE - 1) << 14
    data = bytearray(small)
    data[at : at + 4] = bits.to_bytes(4, "little")
    if b"VP8X" in small:
        place = small.index(b"VP8X") + 12
        data[place : place + 6] = (SIDE - 1).to_bytes(3, "little") * 2
    return bytes(data)


def run_lengths(side):
    """A bitmap in which few bytes stand for many pixels."""
    body = (b"\xff\0" * (side // 255) + b"\0\0") * side
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(body), 0, 0, 1078) + head + bytes(1024) + body


def icon(data):
    return struct.pack("<3H4B2H2I", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(data), 22) + data


def icns(data):
    return (
        b"icns"
        + struct.pack(">I", 16 + len(data))
        + b"ic10"
        + struct.pack(">I", 8 + len(data))
        + data
    )


def with_scans(data, count):
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * count + b"\xff\xd9"


def jpeg_2000(side):
    """A JPEG 2000 that says it is a square of this side, and has a tile of eight pixels."""
    data = save(Image.new("RGBA", (8, 8)), "JPEG2000")
    box, size = data.index(b"ihdr") + 4, data.index(b"\xff\x51") + 6
    sides = struct.pack(">II", side, side)
    return data[:box] + sides + data[box + 8 : size] + sides + data[size + 8 :]


@functools.cache
def many_scans():
    picture = Image.new("RGB", (8_000, 8_000))
    return with_scans(save(picture, "JPEG", progressive=True, exif=exif(6)), 80)


def tags_over_and_over():
    """A TIFF each of whose thousand tags is all of the file."""
    tags = [(256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(278, 4, 1, 10), (279, 4, 1, 100)]
    tags += [(30_000 + number, 7, 4_000_000, 8) for number in range(1_000)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 4_000_008) + bytes(4_000_000) + ifd + bytes(4)


BITMAP = save(PHOTO, "BMP")
WIDE_FRAME = b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
REFUSED = {  # by what is said at the beginning: whoever reads on finds no pixels at all
    "png": lambda: png_head(20_000, 20_000, 2, zlib.compress(bytes(99))),
    "png-absurd": lambda: png_head(0x7FFFFFFF, 0x7FFFFFFF, 2, zlib.compress(bytes(99))),
    "png-chunks": lambda: CLEAN["png"][:33] + chunk(b"tEXt", b"") * 110_000 + CLEAN["png"][33:],
    "jpeg": lambda: jpeg_of(65_000, 65_000),
    "jpeg-segments": lambda: CLEAN["jpeg"][:2] + segment(0xFE, b"") * 20_000 + CLEAN["jpeg"][2:],
    "jpeg-scans": lambda: with_scans(CLEAN["jpeg-progressive"], 300),
    "gif": lambda: b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0" + WIDE_FRAME,
    "gif-blocks": lambda: b"GIF89a" + bytes(7) + b"!\xfe\x01x\0" * 600_000 + b";",
    "webp-chunks": lambda: (
        b"RIFF" + struct.pack("<I", 160_004) + b"WEBP" + riff(b"x   ", b"") * 20_000
    ),
    "ppm-head": lambda: b"P6 20000 20000 255\n",
    "bmp-head": lambda: BITMAP[:18] + struct.pack("<ii", 40_000, 40_000) + BITMAP[26:],
    "tall": lambda: png_head(1, 89_000_000, 2),
    "wide": lambda: png_head(89_000_000, 1, 6),
    "webp": lossless_webp,
    "bmp": lambda: run_lengths(SIDE),
    "ppm": lambda: b"P3 3000 3000 255\n" + b"0 " * 27_000_000,
    "ppm-comments": lambda: b"P3 300 300 255\n" + b"#\n0 " * 270_000,
    "pgm-odd-white": lambda: b"P5 3000 3000 254\n" + bytes(9_000_000),
    "ico": lambda: icon(png_head(13_300, 13_300, 6)),
    "ico-bitmap": lambda: icon(struct.pack("<IiiHHIIiiII", 40, SIDE, 2 * SIDE, 1, 32, *(0,) * 6)),
    "icns": lambda: icns(png_head(13_300, 13_300, 6)),
    "icns-jpeg-2000": lambda: icns(jpeg_2000(4_000)),
    "jpeg-2000": lambda: jpeg_2000(SIDE),
    "scans": many_scans,
    "tiff": tags_over_and_over,
}


@pytest.mark.slow
def test_what_costs_too_much_is_refused_undecoded():
    for make in REFUSED.values():
        data = make()
        for call in (encode_image, decode_image):
            with pytest.raises(ImageError, match=r"too large to be opened|no ordinary|scans"):
                call(data)


LIMITED = """
import resource, sys
from PIL import Image
import moondream_async._images.convert
from moondream_async._images import encode_image
Image.init()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_000_000_000,) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for path in sys.argv[1:]:
    image = encode_image(path)
    print(image.width, image.height)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
def test_largest_pictures_keep_to_a_gigabyte(tmp_path):
    files = {
        "transparent.png": png(SIDE, SIDE, 6),
        "turned.jpg": save(
            Image.new("RGB", (SIDE, SIDE)), "JPEG", progressive=True, subsampling=0, exif=exif(6)
        ),
        "lossy.webp": save(Image.new("RGB", (6_000, 6_000)), "WEBP", exif=exif(6), method=0),
        "strips.tiff": save(Image.new("RGBA", (SIDE, SIDE)), "TIFF", compression="tiff_lzw"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    child = [sys.executable, "-c", LIMITED, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    half = f"{SIDE // 2} {SIDE // 2}"  # of what was decoded
    assert done.stdout.split("\n")[:-1] == [half, half, "3000 3000", half]


def test_small_pictures_of_dear_kinds_are_sent():
    dear = {
        "bmp": run_lengths(510),
        "ppm": b"P3 # a comment\n20 10 255\n" + b"7 " * 600,
        "ico": icon(png(256, 256, 6)),
        "icns": save(PHOTO.resize((512, 512)), "ICNS"),
    }
    for name, data in dear.items():
        assert opened(encode_image(data)).width >= 20, name


@pytest.mark.slow
def test_simulator_refuses_what_costs_too_much_and_measures_a_large_photo():
    dear = [REFUSED[name]() for name in ("tall", "webp", "scans")]
    for data in (*dear, png_head(SIDE, SIDE, 6)):
        with pytest.raises(ValueError, match="too large"):
            measure(data)
    assert measure(save(Image.new("RGB", (SIDE, SIDE), "teal"), "JPEG")).width == SIDE


# What decoders say


def test_warnings_of_decoders_reach_nobody_and_spoil_nothing(capfd):
    class Warner(ImageFile.ImageFile):
        format = "WARN"

        def _open(self):
            self._size, self._mode = (8, 8), "L"
            self.tile = [("raw", (0, 0, 8, 8), 4, ("L", 0, 1))]
            warnings.warn("of the decoder's", stacklevel=1)
            logging.getLogger("PIL.TiffImagePlugin").error("of the decoder's")

    def prepare(found):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(Image.OPEN, "WARN", (Warner, lambda head: head.startswith(b"warn")))
            patch.setattr(Image, "ID", [*Image.ID, "WARN"])
            found.append(encode_image(b"warn" + bytes(64)).width)

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=prepare, args=(found,))
        thread.start()
        thread.join()
        assert found == [8]
        with pytest.raises(UserWarning, match="the user's"):  # whose own are as they were
            warnings.warn("the user's", stacklevel=1)
    assert capfd.readouterr() == ("", "")


def test_tiff_that_libtiff_would_complain_of_is_refused_in_silence(capfd):
    data = save(PHOTO, "TIFF")
    webp = data.replace(b"\3\1\3\0\1\0\0\0\1\0", b"\3\1\3\0\1\0\0\0\x51\xc3")
    assert webp != data
    with pytest.raises(ImageError, match="TIFF compressed as WebP"):
        encode_image(webp)
    assert capfd.readouterr() == ("", "")


def test_clean_pictures_are_still_sent_as_they_are_where_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in CLEAN.values():
            assert encode_image(io.BytesIO(data)).data == data
