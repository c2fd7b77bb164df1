"""All checks, in the order in which they fail fastest: ``python -m tests [--fast]``.

``--fast`` leaves out the linters, which say the same on every Python version, and
the tests marked slow, and tries fewer random inputs. Anything else is handed to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# More than there are processors: most tests wait, for another process or for a clock.
WORKERS = 2 * (os.cpu_count() or 1)

LINTERS = [
    ["ruff", "check"],
    ["ruff", "format", "--check"],
    ["mypy"],
]


def main() -> int:
    arguments = sys.argv[1:]
    fast = "--fast" in arguments
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled once is kept
    rest = [argument for argument in arguments if argument != "--fast"]
    chosen = ["-m", "not slow", "--hypothesis-profile=fast"] if fast else []
    # Neighbours, which share a server or a browser, stay together until a worker is idle.
    tests = ["pytest", f"--numprocesses={WORKERS}", "--dist=worksteal", *chosen, *rest]

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        print("$", *command, flush=True)  # noqa: T201 - a program
        return subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, **options
        )

    def check(command: list[str]) -> None:
        if status := start(command).wait():
            sys.exit(status)

    if not fast:
        # While one processor is with the linters, the other compiles the tests, which in a first
        # run each worker would else do for itself.
        with start([*tests, "--collect-only", "--quiet", "--quiet"], stdout=subprocess.DEVNULL):
            for command in LINTERS:
                check(command)
    check(tests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
