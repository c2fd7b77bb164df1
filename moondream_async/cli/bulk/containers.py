# ruff: noqa: PTH118, PTH119, PTH120, PTH122, PTH123 - paths are strings, as they stand in lines
"""Files that name or hold many pictures: tables with a column of pictures, and videos.

A row is read at a time: of CSV, JSON lines or Parquet. Each frame of a video is a picture with
a line of its own, and has a time.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moondream_async.errors import RequestError
from moondream_async.frames import check_video, decode_video

from .lines import decode, whole
from .sources import Contents, Found, needs, simplest

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_NAMES = ("path", "image", "image_path", "file", "file_name", "filename", "picture", "url")
"""Columns that are taken for the column of pictures, where the user names none."""
_VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".mts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
_QUALITY = 92  # of a frame as JPEG

Row = dict[str, Any]


def is_table(name: str) -> bool:
    """Tell whether a file is read as a table."""
    return name.lower().endswith(_TABLES)


def find_in_table(name: str, column: str | None) -> Iterator[Found]:
    """Yield the pictures of a table, each with its row.

    A relative path starts at the working directory, or, where no file is there, at the
    table's folder.

    Raises:
        RequestError: The first row has no such column, or the file is no such table.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    read = readers.get(os.path.splitext(name)[1].lower(), _json_lines)
    for number, row in enumerate(read(name), 1):
        if column is None:
            column = next((each for each in _NAMES if each in row), None)
        if column is None or (number == 1 and column not in row):
            has = ", ".join(map(str, row))
            raise RequestError(
                f"{name} has no column {column or ' or '.join(_NAMES[:3])} (row {number}), "
                f"but {has}: name the one with the pictures by '--column'{odd_header(row)}"
            )
        place = f"{name}: row {number}"
        path = row.get(column)
        rest = {key: value for key, value in row.items() if key != column}
        if not isinstance(path, str) or not _can_be_path(path):
            own = f"{name}#row={number}"
            fault = f"{place} names no picture in {column}"
            yield Found(own, os.path.basename(own), rest, fault=fault)
            continue
        beside = os.path.join(os.path.dirname(name), path)
        known = "://" in path or os.path.lexists(path)
        here = beside if not known and os.path.lexists(beside) else path
        yield Found(here if "://" in here else simplest(here), path, rest, place)


def odd_header(row: Row) -> str:
    """Return a hint for a row that lacks a column, where the table's header is not UTF-8."""
    if all(whole(name) == name for name in row):
        return ""
    return ", and its header is not UTF-8: save it as UTF-8"


def _can_be_path(text: str) -> bool:
    try:
        return bool(os.fsencode(text))
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def _csv(name: str) -> Iterator[Row]:
    with Path(name).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if name.lower().endswith(".tsv") else ",")
        try:
            for row in rows:
                yield {key: value or "" for key, value in row.items() if key is not None}
        except csv.Error as error:
            raise RequestError(f"{name} is no CSV (line {rows.line_num}): {error}") from error


def _json_lines(name: str) -> Iterator[Row]:
    with Path(name).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield decode(line.removeprefix(b"\xef\xbb\xbf"))
            except UnicodeDecodeError as error:
                why = f"{name}, line {number}: it is not UTF-8: save it as UTF-8"
                raise RequestError(why) from error
            except json.JSONDecodeError as error:  # which counts lines within this one
                why = f"{name}, line {number}, column {error.colno}: no JSON object: {error.msg}"
                raise RequestError(why) from error
            except ValueError as error:
                raise RequestError(f"{name}, line {number}: no JSON object: {error}") from error


def _parquet(name: str) -> Iterator[Row]:
    pq = needs("pyarrow.parquet", "Parquet needs pyarrow", "parquet")
    from pyarrow import ArrowInvalid  # noqa: PLC0415 - an extra, and slow to load

    read = 0
    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1000):
                names = batch.schema.names
                columns = [
                    _values(column, f"{name}: column {each!r} can't be read after row {read}")
                    for each, column in zip(names, batch.columns, strict=True)
                ]
                for values in zip(*columns, strict=True):
                    yield dict(zip(names, values, strict=True))
                read += batch.num_rows
    except ArrowInvalid as error:
        raise RequestError(f"{name} is no Parquet file: {error}") from error


def _values(column: Any, failure: str) -> list[Any]:
    """Return a column's values; times are in microseconds, also where pandas wrote finer ones.

    Raises:
        RequestError: A text is not UTF-8, or a time is too far away.
    """
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to load

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    elif pa.types.is_duration(column.type):
        column = column.cast(pa.duration("us"), safe=False)
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{failure}: {error}") from error
    return values


def is_video(name: str) -> bool:
    """Tell whether a file's name is that of a video.

    >>> is_video("clip.MP4"), is_video("photo.jpg")
    (True, False)
    """
    return name.lower().endswith(_VIDEOS)


def find_frames(path: str, every: float | None) -> Iterator[Found]:
    """Yield the frames of a video as pictures, in order; OSError ends a damaged video."""
    check_video()
    from PIL import Image  # noqa: PLC0415 - --help does without

    try:
        with open(path, "rb") as video:
            status = os.fstat(video.fileno())
            digest = hashlib.file_digest(video, "sha256").hexdigest()
        contents = Contents(status.st_size, status.st_mtime_ns, digest)
        stem = os.path.splitext(os.path.basename(path))[0]
        for frame in filter(None, decode_video(path, threading.Event(), every=every)):
            file = io.BytesIO()
            Image.fromarray(frame.image).save(file, "JPEG", quality=_QUALITY)
            at = f"{frame.time:.6f}".rstrip("0").rstrip(".")
            yield Found(
                f"{path}#t={at}",
                f"{stem}/{at}.jpg",
                time=frame.time,
                data=file.getvalue(),
                contents=contents,
            )
    except OSError:
        raise
    except Exception as error:  # PyAV's have many kinds
        raise OSError(str(error)) from error
