"""The command ``moondream-async``; it needs the extra ``cli``.

This file only checks that the extra is installed. The program is in `_program`, and each
group of commands in a file of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line with `args`, else the process's own; return the exit status.

    The status is 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C, and 141 when the
    reader of the output has gone.
    """
    try:
        try:
            import rich  # noqa: F401, PLC0415 - here a missing extra is an error in one line
            import typer  # noqa: F401, PLC0415 - likewise
        except ImportError:
            hint = "moondream-async: the command line needs: pip install 'moondream-async[cli]'"
            print(hint, file=sys.stderr)  # noqa: T201 - a command may print
            return 1
        from ._program import run  # noqa: PLC0415 - needs the extra

        return run(sys.argv[1:] if args is None else args)
    except KeyboardInterrupt:
        if sys.stderr is not None and sys.stderr.isatty():
            print(file=sys.stderr)  # noqa: T201 - the terminal shows ^C, and a prompt comes next
        return 130  # 128 and the number of SIGINT, as shells have it
