"""The command ``moondream-async``; it needs the extra ``cli``.

This file only finds out whether the extra is there. The program is in
`_program`, and each group of commands in a file of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line with `args`, else with the process's own; return the exit status.

    That is 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C, and 141 when
    the reader of the output has gone away.
    """
    try:
        import rich  # noqa: F401, PLC0415 - only here can its absence be told
        import typer  # noqa: F401, PLC0415 - likewise
    except ImportError:
        line = "moondream-async: the command line needs: pip install 'moondream-async[cli]'"
        print(line, file=sys.stderr)  # noqa: T201 - this is a command's output
        return 1
    from ._program import run  # noqa: PLC0415 - it needs the extra

    return run(sys.argv[1:] if args is None else args)
