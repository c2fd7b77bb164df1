"""Pictures made for the tests: clean ones, ones full of metadata, and how to compare them."""

import io
import random
import struct
import zlib

from PIL import Image, ImageChops

SECRET = b"51.5007N 0.1246W, taken by the owner"


def make_photo(width=96, height=64):
    """Soft shapes: what JPEG is good at, and PNG is not."""
    noise = random.Random(7).randbytes(12 * 8 * 3)
    return Image.frombytes("RGB", (12, 8), noise).resize((width, height), Image.Resampling.BICUBIC)


def make_drawing(width=96, height=64):
    """Four squares of different colours: nothing in it is the same when turned or mirrored."""
    picture = Image.new("RGB", (width, height), (250, 250, 10))
    picture.paste((200, 0, 0), (0, 0, width // 2, height // 2))
    picture.paste((0, 150, 0), (width // 2, 0, width, height // 2))
    picture.paste((0, 0, 90), (0, height // 2, width // 2, height))
    return picture


PHOTO = make_photo()
DRAWING = make_drawing()


def save(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def opened(result):
    """What a server sees: the picture, fully decoded, after its measures were checked."""
    with Image.open(io.BytesIO(result.data)) as picture:
        picture.load()
        assert picture.get_format_mimetype() == result.media_type
        assert picture.size == (result.width, result.height)
        assert getattr(picture, "n_frames", 1) == 1
        return picture


def difference(one, other):
    """The greatest difference of a sample."""
    assert one.size == other.size
    bands = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()
    return max(high for _, high in bands)


def exif(orientation=1):
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = SECRET.decode()  # ImageDescription
    block.get_ifd(0x8825)[0x001D] = SECRET.decode()  # GPSDateStamp
    return block


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def riff(kind, body):
    return kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(65536 * x) for x in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
LINEAR = b"curv\0\0\0\0\0\0\0\0"
GAMMA_2_2 = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))


def profile(name, primaries, curve):
    """An ICC profile of RGB, or of grey for no primaries."""

    def numbers(*values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79),
        b"cprt": b"text\0\0\0\0nobody's\0",
        b"wtpt": numbers(0.9642, 1.0, 0.8249),
        b"kTRC": curve,
    }
    if primaries:
        del tags[b"kTRC"]
        tags |= zip(
            (b"rXYZ", b"gXYZ", b"bXYZ"), (numbers(*each) for each in primaries), strict=True
        )
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, data = b"", b""
    for tag, body in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s", 0, b"\0\0\0\0", 0x02400000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    whole = head + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(whole)) + whole[4:]


ICC = profile("Swapped", (SRGB[1], SRGB[0], SRGB[2]), GAMMA_2_2)  # red and green change places

CLEAN = {
    "jpeg": save(PHOTO, "JPEG"),
    "jpeg-progressive": save(PHOTO, "JPEG", progressive=True),
    "jpeg-444": save(PHOTO, "JPEG", subsampling="4:4:4", quality=98),
    "jpeg-grey": save(PHOTO.convert("L"), "JPEG"),
    "jpeg-restarts": save(PHOTO, "JPEG", restart_marker_rows=1),
    "jpeg-icc": save(PHOTO, "JPEG", icc_profile=ICC),
    "png": save(PHOTO, "PNG"),
    "png-grey": save(PHOTO.convert("L"), "PNG"),
    "png-one-bit": save(PHOTO.convert("1"), "PNG"),
    "png-icc": save(PHOTO, "PNG", icc_profile=ICC),
    "gif": save(PHOTO, "GIF"),
    "webp": save(PHOTO, "WEBP"),
    "webp-lossless": save(PHOTO, "WEBP", lossless=True),
    "webp-icc": save(PHOTO, "WEBP", icc_profile=ICC),
}


def with_secrets(name):
    """A clean file, with metadata wherever its format allows it."""
    data = CLEAN[name]
    if name.startswith("jpeg"):
        thumbnail = b"JFIF\0\x01\x01\0\0\x01\0\x01\x04\x03" + SECRET
        begin = 4 + struct.unpack(">H", data[4:6])[0]
        return (
            data[:2]
            + segment(0xE0, thumbnail)
            + segment(0xE0, b"JFXX\0\x10" + SECRET)
            + segment(0xE1, b"Exif\0\0" + exif().tobytes()[6:] + SECRET)
            + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + SECRET)
            + segment(0xE2, b"MPF\0" + SECRET)
            + b"\xff\xff\xff"  # fill bytes
            + segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04" + SECRET)
            + segment(0xEF, SECRET)
            + segment(0xFE, SECRET)
            + data[begin:]
            + b"\xff\xd8\xff\xe1"
            + SECRET
            + b"\xff\xd9"
        )
    if name.startswith("png"):
        first = 8 + 25
        return (
            data[:first]
            + chunk(b"eXIf", exif().tobytes()[6:])
            + chunk(b"tEXt", b"Comment\0" + SECRET)
            + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRET, 0))
            + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + SECRET)
            + chunk(b"tIME", bytes(7))
            + chunk(b"prVt", SECRET)
            + data[first:]
            + SECRET
        )
    if name.startswith("gif"):
        first = 13 + (3 << (data[10] & 7) + 1)
        block = bytes([len(SECRET)]) + SECRET + b"\0"
        return (
            data[:first]
            + b"\x21\xfe"
            + block
            + b"\x21\xff\x0bXMP DataXMP"
            + block
            + b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
            + data[first:-1]
            + b"\x21\xfe"
            + block
            + b";"
            + SECRET
        )
    chunks = data[12:]
    if chunks[:4] != b"VP8X":
        size = bytes([PHOTO.width - 1, 0, 0, PHOTO.height - 1, 0, 0])
        chunks = riff(b"VP8X", b"\x0c\0\0\0" + size) + chunks
    else:
        chunks = chunks[:8] + bytes([chunks[8] | 0x0C]) + chunks[9:]
    chunks += riff(b"EXIF", exif().tobytes()) + riff(b"XMP ", SECRET) + riff(b"prvt", SECRET)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks + SECRET


def frames(kind, **options):
    turned = [PHOTO.transpose(Image.Transpose.ROTATE_180), DRAWING]
    return save(PHOTO, kind, save_all=True, append_images=turned, duration=40, **options)


def png_head(width, height, colour, body=b""):
    """A PNG that says what it has, and has what it is given."""
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def jpeg_of(width, height):
    """A JPEG that says it has another size than it has."""
    data = CLEAN["jpeg"]
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
