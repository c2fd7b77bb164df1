"""What ``-o`` may name, and the files that are made of a journal: tables, boxes, subtitles."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from moondream_async._images import encode_image
from moondream_async.cli._files import replacing
from moondream_async.errors import MoondreamError, RequestError

from .lines import BOX, Records, encode, text_of, whole
from .shards import check_shards, is_shard_of, shard_name, write_shards
from .sources import needs, picture_of

COLUMNS = (
    *("path", "skill", "question", "object", "caption", "answer", "reasoning_text", "outline"),
    *("objects", "points", "error", "error_type", "request_id", "finish_reason"),
    *("input_tokens", "output_tokens", "tries", "seconds", "size", "sha256"),
)
_OF_LINES = (*COLUMNS, "time")  # which only frames of videos have
_ROWS = 5000  # held at a time
_ANY_SIZE = 1 << 40  # bytes: COCO has the picture's own size, not the size that is sent
_LAST = 2.0  # seconds that the only caption is shown


class Output(NamedTuple):
    """The file or folder that is to be written; its form goes by the end of its name.

    >>> Output.of("a.jsonl").journal, Output.of("a.csv").journal
    ('a.jsonl', 'a.csv.jsonl')
    """

    path: str
    form: str

    @classmethod
    def of(cls, path: str) -> Output:
        """Return the output that ``-o`` names; RequestError where its end has no form."""
        if path == "-":
            return cls(path, "stdout")
        if path.endswith(("/", os.sep)) or Path(path).is_dir():
            return cls(path, "folder")
        for ending in sorted(WRITERS, key=len, reverse=True):
            if path.lower().endswith(ending):
                return cls(path, ending)
        raise RequestError(
            f"'-o {path}': its name must end in {', '.join(WRITERS)}, or in / for a folder of "
            "texts or boxes; or be - for stdout"
        )

    @property
    def journal(self) -> str:
        """The path of the file of lines, from which the other forms are made."""
        if self.form == "folder":
            return os.path.join(self.path, ".moondream.jsonl")  # noqa: PTH118 - a string stays one
        return f"{self.path}.jsonl" if WRITERS.get(self.form) else self.path

    def owns(self, path: str) -> bool:
        """Tell whether a run with this output writes a file."""
        path, own, journal = map(os.path.abspath, (path, self.path, self.journal))
        if self.form == "folder":
            return path.startswith(own + os.sep) and path.endswith((".txt", "data.yaml"))
        if self.form == ".tar" and is_shard_of(path, own):
            return True
        return path in (own, journal, f"{journal}.batches")

    def check(self, *, overwrite: bool) -> None:
        """Refuse, before anything is paid for, what could not be written.

        Raises:
            RequestError: An extra is missing, or the file was not made by a run.
        """
        name = self.path
        if self.form == ".parquet":
            _pyarrow()
        elif self.form == ".tar":
            check_shards()
            name = shard_name(self.path, 0)
        if overwrite or WRITERS.get(self.form) is None:
            return
        if Path(name).exists() and not Path(self.journal).exists():
            raise RequestError(
                f"{name} is there already, and no run has made it: name another file, "
                "or say '--overwrite'"
            )


# -- tables ---------------------------------------------------------------------------------


def _pyarrow() -> Any:
    return needs("pyarrow.parquet", "Parquet needs pyarrow", "parquet")


def _write_parquet(records: Records, path: str) -> None:
    pq = _pyarrow()
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to load

    text, number = pa.string(), pa.float64()
    places = {
        "objects": pa.list_(pa.struct([(name, number) for name in BOX])),
        "points": pa.list_(pa.struct([("x", number), ("y", number)])),
    }
    counts = {name: pa.int64() for name in ("input_tokens", "output_tokens", "tries", "size")}
    types = {**places, **counts, "seconds": number, "time": number}
    columns = _columns(records)
    for record in records():
        for name in record.get("asks", ()):  # answers, whatever the question is called
            types.pop(name, None)
    schema = pa.schema([(name, types.get(name, text)) for name in columns])
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        rows = (_row(record, columns) for record in records())
        while some := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def _write_csv(records: Records, path: str) -> None:
    """Write a row for each picture; lists of boxes and points in it are JSON."""
    with _text_file(path) as file:
        columns = _columns(records)
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for record in records():
            row = _row(record, columns)
            for name in ("objects", "points"):
                if row.get(name) is not None:
                    row[name] = encode(row[name]).decode()
            writer.writerow(row)


def _write_lines(records: Records, path: str) -> None:
    with _text_file(path) as file:
        for record in records():
            file.write(encode(record).decode() + "\n")


@contextmanager
def _text_file(path: str) -> Iterator[io.TextIOBase]:
    """Open a text file, compressed where its name ends in ``.gz``."""
    with replacing(path) as raw:
        packed = path.lower().endswith(".gz")
        # Without a time in the file: the same records make the same file.
        file = gzip.GzipFile(path, "wb", fileobj=raw, mtime=0) if packed else raw
        text = io.TextIOWrapper(file, "utf-8", newline="")
        yield text
        text.flush()
        text.detach()
        if packed:
            file.close()


def _columns(records: Records) -> list[str]:
    """Return a table's columns: its own, those named after questions, and those of the rows."""
    named: dict[str, None] = {}
    rows: dict[str, None] = {}
    timed: dict[str, None] = {}
    for record in records():
        timed.update(dict.fromkeys(["time"] if "time" in record else []))
        named.update(dict.fromkeys(record.get("asks", ())))
        rows.update(dict.fromkeys(record.get("row", ())))
    first = [*COLUMNS[:1], *timed, *COLUMNS[1:4], *named]
    own = [_own_name(name, named) for name in rows]
    return [*first, *(each for each in COLUMNS if each not in first), *own]


def _own_name(name: str, named: Container[str]) -> str:
    return f"row.{name}" if name in _OF_LINES or name in named else name


def _row(record: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    error, file = record.get("error", {}), record.get("file", {})
    asks = record.get("asks", {})
    of_table = {
        _own_name(name, asks): None if value is None else whole(str(value))
        for name, value in record.get("row", {}).items()
    }
    row = {
        **{name: record.get(name) for name in _OF_LINES},
        "error": error.get("message"),
        "error_type": error.get("type"),
        "size": file.get("size"),
        "sha256": file.get("sha256"),
        **{name: record.get(name) for name in asks},
        **of_table,
    }
    return {name: row.get(name) for name in columns}


# -- boxes, for pycocotools, supervision and the training of detectors ----------------------


def _write_coco(records: Records, path: str) -> None:
    """Write boxes in pixels of the upright picture, which is read again.

    Pictures that failed, or have changed since, are left out.
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
        category = categories.setdefault(record.get("object", "object"), len(categories) + 1)
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
    whole_set = {
        "info": {"description": "boxes by Moondream"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": ""} for name, number in categories.items()
        ],
    }
    with replacing(path) as file:
        file.write(encode(whole_set))


def _size_of(record: dict[str, Any]) -> tuple[int, int] | None:
    data = picture_of(record)
    try:
        encoded = None if data is None else encode_image(data, max_bytes=_ANY_SIZE)
    except MoondreamError:
        encoded = None
    return None if encoded is None else (encoded.width, encoded.height)


# -- subtitles ------------------------------------------------------------------------------


def _write_subtitles(records: Records, path: str) -> None:
    """Write the answers about frames as WebVTT or SubRip; each is shown until the next frame's."""
    cues = sorted(
        (max(0.0, float(record["time"])), text)
        for record in records()
        if record.get("time") is not None and (text := text_of(record))
    )
    times = [start for start, _ in cues]
    last = times[-1] - times[-2] if len(times) > 1 else _LAST
    ends = [*times[1:], *(start + last for start in times[-1:])]
    vtt = path.lower().endswith(".vtt")
    with replacing(path) as file:
        if vtt:
            file.write(b"WEBVTT\n\n")
        for number, ((start, text), end) in enumerate(zip(cues, ends, strict=True), 1):
            if vtt:
                said = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
                cue = f"{_clock(start, '.')} --> {_clock(end, '.')}\n{said}\n\n"
            else:
                said = text.replace("-->", "\N{RIGHTWARDS ARROW}")
                cue = f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{said}\n\n"
            file.write(cue.encode())


def _clock(seconds: float, point: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{milliseconds:03}"


WRITERS: dict[str, Callable[[Records, str], None] | None] = {
    ".jsonl": None,
    ".ndjson": None,
    ".jsonl.gz": _write_lines,
    ".csv": _write_csv,
    ".csv.gz": _write_csv,
    ".parquet": _write_parquet,
    ".coco.json": _write_coco,
    ".vtt": _write_subtitles,
    ".srt": _write_subtitles,
    ".tar": write_shards,
}
"""What makes a file with such an end; the old file goes only once the new one is whole.

None is for the journal itself.
"""
