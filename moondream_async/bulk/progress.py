"""The progress of a run."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from .items import BulkResult

_WINDOW = 15.0  # seconds over which the rate is measured


class BulkProgress:
    """The counts of a run; they change while it runs."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        """The number of items; None if the iterable has no length."""
        self.done = 0
        """The number of items that have a result or an error."""
        self.failed = 0
        self.tokens = 0
        """The input and output tokens that the server has reported."""
        self._marks: deque[tuple[float, int]] = deque()

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        return f"<BulkProgress {self.done}{of} done, {self.failed} failed, {self.rate:.1f}/s>"

    @property
    def rate(self) -> float:
        """Items a second, over the last 15 seconds."""
        if len(self._marks) < 2:
            return 0.0
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0

    @property
    def eta(self) -> float | None:
        """Seconds until the end at this rate; None if the rate or the total is unknown."""
        if self.total is None or not self.rate:
            return None
        return (self.total - self.done) / self.rate

    def count(self, result: BulkResult[Any, Any]) -> None:
        """Count a finished item."""
        now = time.monotonic()
        self.done += 1
        self.failed += result.error is not None
        metrics = None if result.result is None else result.result.metrics
        if isinstance(metrics, dict):
            counts = (metrics.get("input_tokens"), metrics.get("output_tokens"))
            self.tokens += sum(each for each in counts if isinstance(each, int))
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[0][0] < now - _WINDOW:
            self._marks.popleft()
