"""What is asked about each picture: the same for all, or filled in from a table's row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from glob import has_magic
from typing import Any

from moondream_async._images import can_prepare
from moondream_async.errors import RequestError

from .lines import ASKED
from .shards import is_shard
from .sources import Found
from .tables import is_table

_COLUMN = re.compile(r"\{([^{}]+)\}")
_MUST_BE_COLUMN = re.compile(r"\{[^\W\d][\w.-]*\}")
"""Braces that are no text, as ``{"a": 1}`` is; other braces are text where no column fits."""
_FILLED = ("question", "object")
_TAKEN = {*ASKED, "path", "row", "error", "error_type", "file", "metrics", "tries", "seconds"}
_TAKEN |= {"request_id", "finish_reason", "input_tokens", "output_tokens"}


class Questions:
    """A skill and its arguments.

    Args:
        skill: The skill.
        arguments: Its arguments; ``{column}`` in a question or an object stands for the
            value in the picture's row.
        asks: Several questions by their names, in place of one.
        model: The model; None for the server's.
        rows: Whether there may be pictures with rows.
    """

    def __init__(
        self,
        skill: str,
        arguments: Mapping[str, Any],
        asks: Mapping[str, str],
        model: str | None,
        *,
        rows: bool = True,
    ) -> None:
        self.skill = skill
        self.arguments = dict(arguments)
        self.asks = dict(asks)
        self._model = model
        self._same: dict[str, Any] | None = None
        filled = [self.arguments.get(name) for name in _FILLED] + list(self.asks.values())
        self._varies = rows and any(text and _COLUMN.search(text) for text in filled)
        for name in self.asks:
            if name in _TAKEN:
                raise RequestError(f"'--ask {name}=...': lines say something else by that name")

    @property
    def varying(self) -> tuple[str, ...]:
        """The arguments that differ from picture to picture."""
        return tuple(name for name in _FILLED if self._differs(self.arguments.get(name) or ""))

    @property
    def each(self) -> int:
        """How many requests a picture takes."""
        return len(self.asks) or 1

    def of(self, found: Found) -> dict[str, Any]:
        """Return what is asked about a picture; RequestError where its row lacks a column."""
        if self._varies:
            return self._filled(found)
        if self._same is None:
            self._same = self._fill(lambda text: text)
        return self._same

    def general(self) -> dict[str, Any]:
        """Return what is asked about all pictures alike."""
        return self._fill(lambda text: None if self._differs(text) else text)

    def _differs(self, text: str) -> bool:
        return self._varies and _COLUMN.search(text) is not None

    def _filled(self, found: Found) -> dict[str, Any]:
        row = found.row or {}

        def value(match: re.Match[str]) -> str:
            if match[1] in row:
                return str(row[match[1]])
            if not _MUST_BE_COLUMN.fullmatch(match[0]):
                return match[0]
            lack = "no table gives it a" if found.row is None else "its row has no"
            raise RequestError(f"{found.name!r}: {lack} column {match[1]!r}")

        return self._fill(lambda text: _COLUMN.sub(value, text))

    def _fill(self, fill: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {"skill": self.skill, "model": self._model, **self.arguments}
        for name in _FILLED:
            if isinstance(asked.get(name), str):
                asked[name] = fill(asked[name])
        if self.asks:
            asked["asks"] = {name: fill(text) for name, text in self.asks.items()}
        return {name: value for name, value in asked.items() if value is not None}


def check_columns(texts: Mapping[str, Any], paths: Sequence[str], lists: Sequence[str]) -> bool:
    """Tell whether there may be pictures with rows; refuse ``{column}`` where there are none.

    Args:
        texts: What the options give, by their names.
        paths: Tables and shards have rows, and a pattern or stdin may name such.
        lists: So may files with paths in them.

    Raises:
        RequestError: A text has a column, and nothing that is named has rows.
    """
    if lists or any(
        each == "-"
        or is_table(each)
        or is_shard(each)
        or (has_magic(each) and not can_prepare(each))
        for each in paths
    ):
        return True
    for option, text in texts.items():
        if column := _MUST_BE_COLUMN.search(str(text)):
            raise RequestError(
                f"'--{option}': {column[0]} stands for a table's column, and PATHS has no table"
            )
    return False
