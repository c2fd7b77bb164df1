"""Tables on the terminal, JSON, and plots."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table as RichTable

from .results import Outcome, Table, Target, quartiles

if TYPE_CHECKING:
    from rich.console import Console


def machine(versions: dict[str, str]) -> dict[str, Any]:
    """Return what the figures were seen on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "load": round(os.getloadavg()[0], 1),
        "versions": dict(sorted(versions.items())),
    }


def show_machine(console: Console, about: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    console.print(
        f"\n{about['date']}, {about['system']}, {about['cores']} cores (load {about['load']}), "
        f"Python {about['python']}, {versions}",
        highlight=False,
    )


def show(console: Console, outcome: Outcome) -> None:
    """Print the tables and notes of one scenario."""
    console.print(f"\n[bold]{outcome.title}[/bold]", highlight=False)
    for table in outcome.tables:
        console.print(_rich(table))
    for note in outcome.notes:
        console.print(note, highlight=False)


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=f"{table.title}, {table.unit}", title_justify="left", box=box.SIMPLE)
    shown.add_column("")
    shown.add_column("median", justify="right")
    shown.add_column("spread", justify="right")
    if table.floor:
        shown.add_column("of the floor", justify="right")
    if table.us:
        shown.add_column("of ours", justify="right")
    shown.add_column("rounds", justify="right")
    for label, values in table.samples.items():
        row = [label, f"{table.median(label):,.{table.digits}f}"]
        row.append(f"{table.spread(label):,.{table.digits}f}")
        row += [_times(table.ratio(label, other)) for other in (table.floor, table.us) if other]
        shown.add_row(*row, str(len(values)))
    return shown


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def show_targets(console: Console, outcomes: list[Outcome]) -> None:
    """Print which targets were reached, and what stands in the way of the others."""
    shown = RichTable(title="Targets", title_justify="left", box=box.SIMPLE)
    for name in ("", "target", "wanted", "measured", ""):
        justify = "right" if name in ("wanted", "measured") else "left"
        shown.add_column(name, justify=justify, overflow="fold")
    missed: list[Target] = []
    left_out: list[Target] = []
    for outcome in outcomes:
        for target in outcome.targets:
            if target.value is None:
                left_out.append(target)
                continue
            wanted = f"{'≥' if target.at_least else '≤'} {target.limit:,g}"
            value = f"{target.value:,.3g}" if target.value < 1000 else f"{target.value:,.0f}"
            word = "reached" if target.reached else "[bold]not reached[/bold]"
            shown.add_row(outcome.name, target.text, wanted, value, word)
            if not target.reached:
                missed.append(target)
    console.print()
    console.print(shown)
    for target in left_out:
        console.print(f"- Not measured in this run: {target.text}.", highlight=False)
    for target in missed:
        reason = target.obstacle or "Not looked into."
        console.print(f"- {target.text}: {target.value:.3g}. {reason}", highlight=False)


def write_json(path: Path, about: dict[str, Any], outcomes: list[Outcome]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = about | {"scenarios": [outcome.as_json() for outcome in outcomes]}
    path.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def draw(directory: Path, outcomes: list[Outcome]) -> list[Path]:
    """Draw a plot for each scenario; ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for outcome in outcomes:
        if outcome.draw is None and not outcome.tables:
            continue
        figure = (outcome.draw or draw_bars)(plt, outcome)
        paths.append(directory / f"{outcome.name}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def draw_bars(plt: Any, outcome: Outcome) -> Any:
    """Draw each table as bars; return the figure."""
    heights = [1.2 + 0.34 * len(table.samples) for table in outcome.tables]
    figure, rows = plt.subplots(
        len(heights),
        1,
        figsize=(9, 0.6 + sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    figure.suptitle(outcome.title, fontsize=12, fontweight="bold")
    for (axes,), table in zip(rows, outcome.tables, strict=True):
        labels = list(table.samples)
        medians = [table.median(label) for label in labels]
        colors = [
            "#d9480f" if "moondream_async" in each else "#adb5bd" if "floor" in each else "#4c6ef5"
            for each in labels
        ]
        ranges = [quartiles(table.samples[label]) for label in labels]
        errors = [
            [max(m - low, 0) for m, (low, _) in zip(medians, ranges, strict=True)],
            [max(high - m, 0) for m, (_, high) in zip(medians, ranges, strict=True)],
        ]
        axes.barh(labels, medians, color=colors, xerr=errors, error_kw={"lw": 1, "alpha": 0.6})
        axes.invert_yaxis()
        if max(medians) > 20 * min(medians) > 0:
            axes.set_xscale("log")
            axes.set_xlabel("logarithmic", fontsize=8)
        for index, (median, (_, high)) in enumerate(zip(medians, ranges, strict=True)):
            axes.annotate(
                f" {median:,.{table.digits}f}", (max(median, high), index), va="center", fontsize=8
            )
        axes.margins(x=0.15)
        axes.set_title(f"{table.title}, {table.unit}", fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure
