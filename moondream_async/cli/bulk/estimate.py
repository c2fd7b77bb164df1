"""The cost of a run, for ``--dry-run``: counted as far as possible, else estimated."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from moondream_async.errors import MoondreamError

from .pending import Pending
from .progress import clock, cost
from .questions import Questions
from .remote import is_remote, size_of_remote
from .sources import Found

_PICTURE = 740
"""Tokens of a picture: 27 by 27 patches, and some more."""
_WRITTEN = {"short": 40, "normal": 100, "long": 250, "query": 30, "detect": 60, "point": 30}
_WRITTEN["segment"] = 200
CLOUD_RATE = 2.0  # requests a second that the cloud allows everybody


class Estimate:
    """How many pictures, requests, bytes and tokens a run would take."""

    def __init__(self, questions: Questions) -> None:
        self.pictures = self.done = self.refused = self.requests = self.size = 0
        self._questions = questions
        words = "".join([*questions.asks.values(), questions.arguments.get("question") or ""])
        kind = questions.arguments.get("length") or questions.skill
        self._spent = _PICTURE * questions.each + len(words) / 4  # tokens, of a picture
        self._written = float(_WRITTEN.get(kind, _WRITTEN["normal"])) * questions.each

    def learn(self, records: Iterable[dict[str, Any]]) -> None:
        """Estimate the tokens of a picture from the pictures that are done."""
        sums: Counter[str] = Counter()
        for record in records:
            if record["input_tokens"] and not record.get("error"):
                sums["n"] += 1
                sums["in"] += record["input_tokens"]
                sums["out"] += record["output_tokens"] or 0
        if sums["n"]:
            self._spent, self._written = sums["in"] / sums["n"], sums["out"] / sums["n"]

    def add(self, pending: Pending) -> None:
        """Count a picture, and the size of its file; this blocks."""
        self.pictures += 1
        self.requests += len(pending.items(None))
        data, path = pending.found.data, pending.found.path
        try:
            if data is not None:
                self.size += len(data)
            elif is_remote(path):
                self.size += size_of_remote(path)
            else:
                self.size += os.stat(path).st_size  # noqa: PTH116 - a string
        except OSError:
            self.refused += 1

    def refuse(self, _found: Found, _error: MoondreamError) -> None:
        """Count a picture that can't be asked about."""
        self.refused += 1

    def describe(self, rate: float | None, *, by_batch: bool) -> list[str]:
        """Return the lines to print. `rate`: requests a second, None where it is unknown."""
        share = self.requests / self._questions.each
        spent, written = self._spent * share, self._written * share
        dollars = cost(spent, written) * (0.5 if by_batch else 1.0)
        lines = [
            (
                f"{self.pictures:,} pictures to ask about, {self.size / 1e6:,.1f} MB, "
                f"{self.requests:,} requests; {self.done:,} done before"
            ),
            f"about {spent + written:,.0f} tokens, which cost ${dollars:,.2f} on Moondream Cloud",
        ]
        if self.refused:
            lines.append(f"{self.refused:,} can't be read or asked about")
        if rate and not by_batch:
            lines.append(f"about {clock(self.requests / rate)} at {rate:g} requests a second")
        return lines
