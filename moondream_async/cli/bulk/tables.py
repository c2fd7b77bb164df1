# ruff: noqa: PTH118, PTH120, PTH122 - paths are strings here, as they stand in lines
"""Tables with a column of pictures: CSV, JSON lines, Parquet. A row is read at a time."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from moondream_async.errors import RequestError

from .names import simplest
from .sources import Found, needs

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
NAMES = ("path", "image", "image_path", "file", "file_name", "filename", "picture", "url")
"""Columns that are taken for the column of pictures, where the user names none."""

Row = dict[str, Any]


def is_table(name: str) -> bool:
    """Tell whether a file is read as a table."""
    return name.lower().endswith(ENDINGS)


def find_in_table(name: str, column: str | None) -> Iterator[Found]:
    """Yield the pictures of a table, each with its row.

    A relative path starts at the working directory, or, where no file is there, at the
    table's folder.

    Raises:
        RequestError: The first row has no such column, or the file is no such table.
    """
    ending = os.path.splitext(name)[1].lower()
    read: Callable[[str], Iterator[Row]] = {".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(
        ending, _json_lines
    )
    folder = os.path.dirname(name)
    for number, row in enumerate(read(name), 1):
        if column is None:
            column = next((each for each in NAMES if each in row), None)
        if column is None or (number == 1 and column not in row):
            has = ", ".join(map(str, row))
            raise RequestError(
                f"{name} has no column {column or ' or '.join(NAMES[:3])} (row {number}), "
                f"but {has}: name the one with the pictures by '--column'"
            )
        path = row.get(column)
        rest = {key: value for key, value in row.items() if key != column}
        if not isinstance(path, str) or not path:
            own = f"{name}#row={number}"
            fault = f"{name}: row {number} names no picture in {column}"
            yield Found(own, os.path.basename(own), rest, fault=fault)  # noqa: PTH119
            continue
        beside = os.path.join(folder, path)
        known = "://" in path or os.path.lexists(path)
        here = beside if not known and os.path.lexists(beside) else path
        yield Found(here if "://" in here else simplest(here), path, rest)


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
                yield msgspec.json.decode(line.removeprefix(b"\xef\xbb\xbf"), type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise RequestError(f"{name}, line {number}: no JSON object: {error}") from error


def _parquet(name: str) -> Iterator[Row]:
    pq = needs("pyarrow.parquet", "Parquet needs pyarrow", "parquet")
    from pyarrow import ArrowInvalid  # noqa: PLC0415 - an extra, and slow to load

    try:
        with pq.ParquetFile(name) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise RequestError(f"{name} is no Parquet file: {error}") from error
