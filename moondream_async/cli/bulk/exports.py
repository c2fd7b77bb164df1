# ruff: noqa: PTH122 - paths are strings here, as they stand in lines
"""What other programs read: Parquet, and a text file beside each picture's name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from moondream_async.errors import RequestError
from moondream_async.results import Result

from .journal import replacing
from .sources import Found

_ROWS = 5000  # held at a time


def check_parquet() -> None:
    """Refuse where Parquet can't be written, before anything is paid for.

    Raises:
        RequestError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415 - only to see whether it is there
    except ImportError:
        raise RequestError(
            "Parquet needs pyarrow: pip install 'moondream-async[parquet]'"
        ) from None


def write_parquet(records: Iterable[dict[str, Any]], path: str) -> None:
    """Write a journal's records as a table, a row for each picture.

    Raises:
        OSError: It can't be written; what was there stays.
    """
    import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to load
    import pyarrow.parquet as pq  # noqa: PLC0415 - likewise

    text, number = pa.string(), pa.float64()
    places = {
        "objects": pa.list_(
            pa.struct([(name, number) for name in ("x_min", "y_min", "x_max", "y_max")])
        ),
        "points": pa.list_(pa.struct([("x", number), ("y", number)])),
    }
    texts = ("path", "skill", "question", "object", "caption", "answer", "reasoning_text")
    schema = pa.schema(
        [
            *((name, text) for name in texts),
            *places.items(),
            *((name, text) for name in ("error", "error_type", "request_id", "finish_reason")),
            *((name, pa.int64()) for name in ("input_tokens", "output_tokens", "tries")),
            ("seconds", number),
            ("size", pa.int64()),
            ("sha256", text),
        ]
    )
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        rows = map(_row, records)
        while some := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    error, file = record.get("error") or {}, record.get("file") or {}
    metrics = record.get("metrics") or {}
    return {
        **record,
        "error": error.get("message"),
        "error_type": error.get("type"),
        "input_tokens": metrics.get("input_tokens"),
        "output_tokens": metrics.get("output_tokens"),
        "size": file.get("size"),
        "sha256": file.get("sha256"),
    }


class TextFolder:
    """A folder with a text file for each picture, as training tools read them.

    ``photos/cats/1.jpg``, found in ``photos``, is told of in ``cats/1.txt``. Two pictures
    that would share a file, as ``1.jpg`` and ``1.png``, are the second one's error.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._owners: dict[int, int] = {}  # hashes, which are smaller than paths

    def claim(self, found: Found) -> None:
        """Take a picture's text file for it.

        Raises:
            RequestError: It is another's.
        """
        path = self.path(found)
        if self._owners.setdefault(hash(path), hash(found.path)) != hash(found.path):
            raise RequestError(f"{found.name!r}: {path} is the text of another picture")

    def path(self, found: Found) -> Path:
        """Return where the text about a picture goes."""
        below = os.path.normpath(os.path.splitext(found.below)[0]).lstrip(os.sep)
        return self._folder / f"{below}.txt"

    def write(self, found: Found, result: Result) -> None:
        """Write the text of an answer, in one line.

        Raises:
            OSError: It can't be written.
        """
        path = self.path(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = result["caption"] if "caption" in result else result["answer"]
        with replacing(path, sync=False) as file:  # there are many, and each can be had again
            file.write((" ".join(text.split()) + "\n").encode())
