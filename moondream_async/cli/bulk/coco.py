"""Boxes as COCO has them, for pycocotools, supervision, and who trains detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from moondream_async._images import encode_image
from moondream_async.cli._files import replacing
from moondream_async.errors import MoondreamError

from .lines import encode
from .names import path_of
from .sources import Contents, read_same

_ANY_SIZE = 1 << 40  # bytes: a picture's own size is wanted, and not that of what is sent


def write_coco(records: Callable[[], Iterable[dict[str, Any]]], path: str) -> None:
    """Write a journal's boxes in pixels of the upright picture. It reads each picture again.

    Pictures that failed, or have changed since, are left out.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    categories: dict[str, int] = {}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in records():
        size = None if record.get("error") else _size_of(record)
        if size is None:
            continue
        image = len(images) + 1
        width, height = size
        images.append({"id": image, "file_name": record["path"], "width": width, "height": height})
        name = record.get("object", "object")
        category = categories.setdefault(name, len(categories) + 1)
        for box in record.get("objects", ()):
            left, top = box["x_min"] * width, box["y_min"] * height
            wide = (box["x_max"] - box["x_min"]) * width
            high = (box["y_max"] - box["y_min"]) * height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [round(each, 2) for each in (left, top, wide, high)],
                    "area": round(wide * high, 2),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    named = [{"id": each, "name": name, "supercategory": ""} for name, each in categories.items()]
    with replacing(path) as file:
        file.write(
            encode(
                {
                    "info": {"description": "boxes by Moondream"},
                    "licenses": [],
                    "images": images,
                    "annotations": annotations,
                    "categories": named,
                }
            )
        )


def _size_of(record: dict[str, Any]) -> tuple[int, int] | None:
    file = record.get("file")
    data = file and read_same(path_of(record["path"]), Contents(**file))
    if data is None:
        return None
    try:
        encoded = encode_image(data, max_bytes=_ANY_SIZE)
    except MoondreamError:
        return None
    return encoded.width, encoded.height
