"""Tables that other programs read: Parquet, CSV, and lines of JSON that are packed."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from moondream_async.cli._files import replacing
from moondream_async.errors import MissingExtraError

from .coco import write_coco
from .lines import encode, whole
from .shards import write_shards
from .video import write_subtitles

Records = Callable[[], Iterable[dict[str, Any]]]
"""Gives the lines of a journal; it is asked more than once."""

_ROWS = 5000  # held at a time
_BOX = ("x_min", "y_min", "x_max", "y_max")
COLUMNS = (
    *("path", "skill", "question", "object", "caption", "answer", "reasoning_text", "outline"),
    *("objects", "points", "error", "error_type", "request_id", "finish_reason"),
    *("input_tokens", "output_tokens", "tries", "seconds", "size", "sha256"),
)


def check_parquet() -> None:
    """Refuse where Parquet can't be written, before anything is paid for.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - only to see whether it is there
    except ImportError:
        raise MissingExtraError(
            "Parquet needs pyarrow: pip install 'moondream-async[parquet]'"
        ) from None


def write_parquet(records: Records, path: str) -> None:
    """Write a journal's records as a table, a row for each picture.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to load
    import pyarrow.parquet as pq  # noqa: PLC0415 - likewise

    text, number = pa.string(), pa.float64()
    places = {
        "objects": pa.list_(pa.struct([(name, number) for name in _BOX])),
        "points": pa.list_(pa.struct([("x", number), ("y", number)])),
    }
    whole = {name: pa.int64() for name in ("input_tokens", "output_tokens", "tries", "size")}
    types = {**places, **whole, "seconds": number, "time": number}
    columns = _columns(records)
    own = {name for record in records() for name in record.get("asks", ())}
    types = {name: kind for name, kind in types.items() if name not in own}
    schema = pa.schema([(name, types.get(name, text)) for name in columns])
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        rows = (_row(record, columns) for record in records())
        while some := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def write_csv(records: Records, path: str) -> None:
    """Write a journal's records as CSV, a row for each picture; lists in it are JSON.

    Raises:
        OSError: It can't be written; what was there stays.
    """
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


def write_packed(records: Records, path: str) -> None:
    """Write a journal's records as lines of JSON, packed.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    with _text_file(path) as file:
        for record in records():
            file.write(encode(record).decode() + "\n")


@contextmanager
def _text_file(path: str) -> Iterator[io.TextIOBase]:
    """Open a text file, packed where its name ends in ``.gz``."""
    with replacing(path) as raw:
        packed = path.lower().endswith(".gz")
        # Without a time in it: the same records are the same file.
        file = gzip.GzipFile(path, "wb", fileobj=raw, mtime=0) if packed else raw
        text = io.TextIOWrapper(file, "utf-8", newline="")
        yield text
        text.flush()
        text.detach()
        if packed:
            file.close()


def _columns(records: Records) -> list[str]:
    """Return the columns of a table: its own, the names of questions, and those of rows."""
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
    return f"row.{name}" if name in COLUMNS or name in named else name


def _row(record: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    error, file = record.get("error", {}), record.get("file", {})
    asks = record.get("asks", {})
    of_table = {
        _own_name(name, asks): None if value is None else whole(str(value))
        for name, value in record.get("row", {}).items()
    }
    row = {
        **of_table,
        **record,
        "error": error.get("message"),
        "error_type": error.get("type"),
        "size": file.get("size"),
        "sha256": file.get("sha256"),
        **{name: record.get(name) for name in asks},
    }
    return {name: row.get(name) for name in columns}


WRITERS: dict[str, Callable[[Records, str], None]] = {
    "parquet": write_parquet,
    "csv": write_csv,
    "csv.gz": write_csv,
    "jsonl.gz": write_packed,
    "coco": write_coco,
    "vtt": write_subtitles,
    "srt": write_subtitles,
    "shards": write_shards,
}
"""Who makes a file of a form, from a journal's records."""
