"""What scenarios give: samples, tables of them, and targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


def quartiles(values: list[float]) -> tuple[float, float]:
    """Return the lower and the upper one."""
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


@dataclass
class Table:
    """One quantity of all contenders.

    Its ratios are medians of the ratios of each round, since what else the machine does
    changes from one round to the next, and weighs on all contenders of a round alike.
    """

    title: str
    unit: str
    samples: dict[str, list[float]]
    """A value a round for each contender."""
    floor: str | None = None
    """The contender that the first column of ratios is to."""
    us: str | None = None
    """The contender that the second column of ratios is to."""
    digits: int = 2

    def median(self, label: str) -> float:
        """Return the middle of what was measured."""
        return statistics.median(self.samples[label])

    def spread(self, label: str) -> float:
        """Return the distance of the quartiles."""
        lower, upper = quartiles(self.samples[label])
        return upper - lower

    def ratio(self, label: str, to: str | None) -> float | None:
        """Return how many times `to` it is; None if one of both was not measured."""
        values, others = self.samples.get(label), self.samples.get(to or "")
        if not values or not others:
            return None
        pairs = list(zip(values, others, strict=False))
        return statistics.median(a / b for a, b in pairs) if all(b for _, b in pairs) else None


@dataclass
class Target:
    """What was to be reached."""

    text: str
    value: float | None
    """What was measured; None if it could not be."""
    limit: float
    at_least: bool = False
    obstacle: str = ""
    """What stands in the way; said where the target was not reached."""

    @property
    def reached(self) -> bool | None:
        """Whether it was; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass
class Outcome:
    """All that one scenario gives."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    draw: Callable[[Any, Outcome], Any] | None = None
    """Makes a figure with the `matplotlib.pyplot` it is given; by default, bars of each table."""

    def as_json(self) -> dict[str, Any]:
        """Return it with every sample, and without the plot."""
        return {
            "name": self.name,
            "title": self.title,
            "tables": [
                asdict(table) | {"medians": {label: table.median(label) for label in table.samples}}
                for table in self.tables
            ],
            "targets": [asdict(target) | {"reached": target.reached} for target in self.targets],
            "notes": self.notes,
        }
