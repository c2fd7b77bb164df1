"""What a bulk run has done, on stderr, and what it would take.

The progress is a bar on a terminal, elsewhere a line now and then.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from moondream_async.cli._output import note, one_line
from moondream_async.cli._words import limits_in_words

from .questions import Pending, Questions
from .remote import is_remote, size_of_remote

if TYPE_CHECKING:
    from typing import Self

INPUT_PRICE, OUTPUT_PRICE = 0.30e-6, 2.50e-6  # dollars a token (docs.moondream.ai/pricing)
BATCH_DISCOUNT = 0.5

_REASONS = 5  # in the summary
_VARYING = re.compile(r"'[^']*'|\b\d[\d,.]*\b")
"""The parts of a reason that differ from picture to picture: names and numbers."""
_WINDOW = 15.0  # seconds over which the rate is measured
_BETWEEN_LINES = 5.0  # seconds

_PICTURE = 740
"""Tokens of a picture: 27 by 27 patches, and some more."""
_WRITTEN = {"short": 40, "normal": 100, "long": 250, "query": 30, "detect": 60, "point": 30}
_WRITTEN["segment"] = 200
CLOUD_RATE = 2.0  # requests a second that the cloud allows everybody


class Progress:
    """Counts answers, failures, tokens and dollars; `show` prints them.

    A context manager, which takes the bar off the terminal at its end.
    """

    def __init__(self, *, price: float | None = 1.0) -> None:
        self.total: int | None = None
        """How many pictures there are, done before or not; None while unknown."""
        self.answered = self.failed = self.skipped = 0
        self.reasons: Counter[str] = Counter()
        """How many pictures failed for each reason, as a terminal may show it."""
        self.tokens = 0
        self.cost = 0.0
        self._price = price
        self._began = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._began, 0)])
        self._bar: Any = None
        self._shown_at = self._began

    def __enter__(self) -> Self:
        from rich.console import Console  # noqa: PLC0415 - takes a while to load

        console = Console(stderr=True, highlight=False)
        if console.is_terminal:
            from rich.progress import BarColumn, TextColumn  # noqa: PLC0415 - likewise
            from rich.progress import Progress as Bars  # noqa: PLC0415 - likewise

            text = TextColumn("{task.description}", markup=False)
            self._bar = Bars(BarColumn(bar_width=24), text, console=console, auto_refresh=False)
            self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._refresh()
            self._bar.stop()

    @property
    def done(self) -> int:
        """How many pictures were answered or failed, in this run or an earlier one."""
        return self.answered + self.failed + self.skipped

    def count(self, metrics: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> None:
        """Count a picture, the tokens that the server reports, and the reason of a failure."""
        if error is None:
            self.answered += 1
        else:
            self.failed += 1
            said = f"{error.get('type') or 'Error'}: {error.get('message') or ''}"
            words = one_line(limits_in_words(said))
            self.reasons[_VARYING.sub("...", words)[:200]] += 1
        tokens = [(metrics or {}).get(name) for name in ("input_tokens", "output_tokens")]
        spent, written = (each if isinstance(each, int) else 0 for each in tokens)
        self.tokens += spent + written
        self.cost += cost(spent, written) * (self._price or 0.0)

    def show(self) -> None:
        """Draw the bar; or print a line, at most every few seconds."""
        now = time.monotonic()
        self._marks.append((now, self.answered + self.failed))
        while len(self._marks) > 2 and self._marks[0][0] < now - _WINDOW:
            self._marks.popleft()
        if self._bar is not None:
            self._refresh()
        elif now - self._shown_at >= _BETWEEN_LINES:
            self._shown_at = now
            note(self.describe())

    def describe(self) -> str:
        """Return the state in a line."""
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        rate = (after - before) / (end - start) if end > start else 0.0
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.done:,}{of}", f"{rate:.1f}/s"]
        if self.total is not None and rate and self.total > self.done:
            parts.append(f"{clock((self.total - self.done) / rate)} left")
        failed = f"{self.failed:,} failed"
        for why, count in self.reasons.most_common(1):
            failed += f" ({count:,}: {why[:60]})"
        return ", ".join([*parts, failed, self._spent()])

    def summary(self) -> list[str]:
        """Return the result of the run in a line, and the commonest reasons of failures."""
        seconds = time.monotonic() - self._began
        parts = [f"{self.answered:,} answered", f"{self.failed:,} failed"]
        if self.skipped:
            parts.append(f"{self.skipped:,} done before")
        rate = (self.answered + self.failed) / seconds if seconds else 0.0
        parts += [self._spent(), f"{clock(seconds)} ({rate:.1f}/s)"]
        lines = [", ".join(parts)]
        commonest = self.reasons.most_common(_REASONS)
        lines += [f"{count:,} failed: {why}" for why, count in commonest]
        if (more := len(self.reasons) - _REASONS) > 0:
            lines.append(f"... and for {more:,} other reasons")
        return lines

    def _spent(self) -> str:
        """Return the tokens, and the dollars where the server is the cloud."""
        dollars = "" if self._price is None else f", ${self.cost:.4f}"
        return f"{self.tokens:,} tokens{dollars}"

    def _refresh(self) -> None:
        self._bar.update(0, total=self.total, completed=self.done, description=self.describe())
        self._bar.refresh()


class Estimate:
    """How many pictures, requests, bytes and tokens a run would take."""

    def __init__(self, questions: Questions) -> None:
        self.pictures = self.done = self.refused = self.requests = self.size = 0
        self._each = len(questions.asks) or 1  # requests that a picture takes
        words = "".join([*questions.asks.values(), questions.arguments.get("question") or ""])
        kind = questions.arguments.get("length") or questions.skill
        self._spent = _PICTURE * self._each + len(words) / 4  # tokens, of a picture
        self._written = float(_WRITTEN.get(kind, _WRITTEN["normal"])) * self._each

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
        self.requests += len(pending.items())
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

    def refuse(self, *_: object) -> None:
        """Count a picture that can't be asked about."""
        self.refused += 1

    def describe(self, rate: float | None, *, by_batch: bool) -> list[str]:
        """Return the lines to print. `rate`: requests a second, None where it is unknown."""
        share = self.requests / self._each
        spent, written = self._spent * share, self._written * share
        dollars = cost(spent, written) * (BATCH_DISCOUNT if by_batch else 1.0)
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


def cost(spent: float, written: float) -> float:
    """Return what tokens cost on Moondream Cloud, in dollars."""
    return spent * INPUT_PRICE + written * OUTPUT_PRICE


def clock(seconds: float) -> str:
    r"""Return a duration as people write it.

    >>> clock(7), clock(125), clock(7384)
    ('0:07', '2:05', '2:03:04')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
