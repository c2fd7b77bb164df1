"""``python -m benchmarks``: measure, print the tables, write JSON, draw the plots."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from rich.console import Console

from . import report
from .bench import Bench

SCENARIOS = (
    *(
        "coalesced",
        "many",
        "first",
        "calls",
        "bulk",
        "pictures",
        "photos",
        "large",
        "imports",
        "growth",
    ),
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "scenarios", nargs="*", choices=[[], *SCENARIOS], help="which; without a name, all"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and less of each")
    parser.add_argument("--json", type=Path, default=RESULTS / "results.json", metavar="FILE")
    parser.add_argument("--plots", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    console = Console(width=110)
    begun = time.monotonic()
    outcomes = []
    with Bench(quick=options.quick) as bench:
        for name in options.scenarios or SCENARIOS:
            scenario = importlib.import_module(f".scenarios.{name}", __package__)
            outcomes.append(scenario.run(bench))
            report.show(console, outcomes[-1])
    about = report.machine(bench.versions)
    report.show_targets(console, outcomes)
    report.show_machine(console, about)
    for name, reason in bench.left_out.items():
        console.print(f"Left out: {name} ({reason}); see benchmarks/README.md", markup=False)
    report.write_json(options.json, about, outcomes)
    console.print(f"All samples: {options.json}")
    try:
        for path in report.draw(options.plots, outcomes):
            console.print(f"Plot: {path}")
    except ImportError:
        console.print(
            "No plots: they need matplotlib. python -m pip install '.[bench]'", markup=False
        )
    console.print(f"{time.monotonic() - begun:.0f} seconds")


if __name__ == "__main__":
    main()
