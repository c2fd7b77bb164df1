"""What is asked about each picture: the same for all, or filled in from a table's row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moondream_async.errors import RequestError

from .lines import ASKED
from .sources import Found

_COLUMN = re.compile(r"\{([^{}]+)\}")
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
    """

    def __init__(
        self, skill: str, arguments: Mapping[str, Any], asks: Mapping[str, str], model: str | None
    ) -> None:
        self.skill = skill
        self.arguments = dict(arguments)
        self.asks = dict(asks)
        self._model = model
        self._same: dict[str, Any] | None = None
        filled = [self.arguments.get(name) for name in _FILLED] + list(self.asks.values())
        self._varies = any(text and _COLUMN.search(text) for text in filled)
        for name in self.asks:
            if name in _TAKEN:
                raise RequestError(f"'--ask {name}=...': lines say something else by that name")

    @property
    def varying(self) -> tuple[str, ...]:
        """The arguments that differ from picture to picture."""
        return tuple(name for name in _FILLED if _COLUMN.search(self.arguments.get(name) or ""))

    @property
    def each(self) -> int:
        """How many requests a picture takes."""
        return len(self.asks) or 1

    def of(self, found: Found) -> dict[str, Any]:
        """Return what is asked about a picture; RequestError where its row lacks a column."""
        if self._varies and found.row is not None:
            return self._filled(found)
        if self._same is None:
            self._same = self._fill(lambda text: text)
        return self._same

    def general(self) -> dict[str, Any]:
        """Return what is asked about all pictures alike."""
        return self._fill(lambda text: None if _COLUMN.search(text) else text)

    def _filled(self, found: Found) -> dict[str, Any]:
        row = found.row or {}

        def value(match: re.Match[str]) -> str:
            if match[1] not in row:
                raise RequestError(f"{found.name!r}: its row has no column {match[1]!r}")
            return str(row[match[1]])

        return self._fill(lambda text: _COLUMN.sub(value, text))

    def _fill(self, fill: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {"skill": self.skill, "model": self._model, **self.arguments}
        for name in _FILLED:
            if isinstance(asked.get(name), str):
                asked[name] = fill(asked[name])
        if self.asks:
            asked["asks"] = {name: fill(text) for name, text in self.asks.items()}
        return {name: value for name, value in asked.items() if value is not None}
