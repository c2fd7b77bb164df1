"""The oldest dependencies that pyproject.toml allows: ``python -m tests.oldest``.

Prints a requirement a line, for pip: those of the package itself and of the extras that
its users install.
"""

import re
import tomllib
from pathlib import Path

EXTRAS = ["cli", "draw", "parquet"]

PROJECT = tomllib.loads(
    Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
)["project"]

if __name__ == "__main__":
    groups = [PROJECT["optional-dependencies"][extra] for extra in EXTRAS]
    for requirement in sum(groups, PROJECT["dependencies"]):
        print(re.sub(">=", "==", requirement))  # noqa: T201 - a program
