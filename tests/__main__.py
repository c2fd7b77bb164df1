"""All checks: ``python -m tests [--fast]``.

``--fast`` leaves out the linters, which say the same on every Python version, and
the tests marked slow, and tries fewer random inputs. Anything else is handed to pytest.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# More than there are processors: most tests wait, for another process or for a clock.
WORKERS = 2 * (os.cpu_count() or 1)


async def run(*command: str, **options: Any) -> None:
    """Run a module's program; end it if this is cancelled."""
    print("$", *command, flush=True)  # noqa: T201 - a program
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is compiled once is kept
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *command, cwd=ROOT, env=environment, **options
    )
    try:
        if status := await process.wait():
            raise subprocess.CalledProcessError(status, command)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
            await process.wait()


async def main() -> None:
    arguments = sys.argv[1:]
    fast = "--fast" in arguments
    rest = [argument for argument in arguments if argument != "--fast"]
    chosen = ["-m", "not slow", "--hypothesis-profile=fast"] if fast else []
    # Neighbours, which share a server or a browser, stay together until a worker is idle.
    tests = ["pytest", f"--numprocesses={WORKERS}", "--dist=worksteal", *chosen, *rest]
    if fast:
        await run(*tests)
        return
    await run("ruff", "check")
    await run("ruff", "format", "--check")
    # The type checker takes one processor. Beside it the other one compiles the tests, which in a
    # first run each worker would else do for itself, and begins to run them.
    async with asyncio.TaskGroup() as group:
        group.create_task(run("mypy"))
        await run(*tests, "--collect-only", "--quiet", "--quiet", stdout=subprocess.DEVNULL)
        group.create_task(run(*tests))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* subprocess.CalledProcessError as failed:
        sys.exit(failed.exceptions[0].returncode)
