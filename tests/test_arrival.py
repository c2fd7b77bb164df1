"""Pictures as the server gets them: `test_images.py` says what becomes of every kind."""

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageOps

import moondream_async as md

DRAWING = Image.new("RGB", (48, 32), (250, 250, 250))
DRAWING.paste((200, 30, 30), (4, 4, 20, 28))
DRAWING.paste((30, 60, 200), (24, 10, 44, 20))


def png(picture, **options):
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def as_path(folder):
    path = folder / "drawing.png"
    path.write_bytes(png(DRAWING))
    return path


KINDS = {  # by where they are prepared
    "bytes, at once": lambda _: png(DRAWING),
    "path, with other small files": as_path,
    "PIL image, in a thread": lambda _: DRAWING.copy(),
    "array": lambda _: np.asarray(DRAWING.convert("RGBA")),
}


def arrived(simulator):
    """The last picture that the server got, and its bytes."""
    header, _, data = simulator.requests[-1].body["image_url"].partition(",")
    assert header.startswith("data:image/")
    assert header.endswith(";base64")
    raw = base64.b64decode(data, validate=True)
    return Image.open(io.BytesIO(raw)), raw


@pytest.mark.parametrize("kind", KINDS)
async def test_the_same_pixels_arrive_from_every_kind_of_input(kind, client, simulator, tmp_path):
    await client.caption(KINDS[kind](tmp_path))
    picture, _ = arrived(simulator)
    assert picture.convert("RGB").tobytes() == DRAWING.tobytes()


async def test_a_prepared_picture_arrives_as_it_was_prepared(client, simulator):
    image = await client.encode_image(png(DRAWING))
    for _ in range(2):
        await client.caption(image)
        assert arrived(simulator)[1] == image.data


@pytest.mark.parametrize("max_pixels", [48 * 32, 48 * 32 - 1])
async def test_no_picture_has_more_pixels_than_its_client_allows(
    max_pixels, client, simulator, tmp_path
):
    pictures = [await client.encode_image(DRAWING), *(kind(tmp_path) for kind in KINDS.values())]
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_pixels=max_pixels) as sparing:
        for picture in pictures:
            await sparing.caption(picture)
            width, height = arrived(simulator)[0].size
            assert (width * height == 48 * 32) == (max_pixels == 48 * 32)
            assert width * height <= max_pixels


async def test_a_picture_arrives_upright_and_without_its_metadata(client, simulator):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "where I live"
    data = png(DRAWING, exif=exif.tobytes())
    assert b"where I live" in data
    await client.caption(data)
    picture, raw = arrived(simulator)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert picture.convert("RGB").tobytes() == upright.tobytes()
    assert b"where I live" not in raw
    assert picture.getexif().get(0x0112, 1) == 1
