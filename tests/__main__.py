"""All checks, in the order in which they fail fastest: ``python -m tests [--fast]``.

``--fast`` leaves out the linters, which say the same on every Python version, and
the tests marked slow, and tries fewer random inputs. Anything else is handed to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

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
    commands = [] if fast else LINTERS
    chosen = ["-m", "not slow", "--hypothesis-profile=fast"] if fast else []
    # What is compiled once, our modules and rewritten tests, is not compiled by each process anew.
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    rest = [argument for argument in arguments if argument != "--fast"]
    for command in [*commands, ["pytest", f"--numprocesses={WORKERS}", *chosen, *rest]]:
        print("$", *command, flush=True)  # noqa: T201 - a program
        status = subprocess.call([sys.executable, "-m", *command], cwd=ROOT, env=environment)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
