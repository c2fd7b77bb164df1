"""Ctrl-C while the command line loads: an end without a traceback.

Python loads the whole package before the command line's first line runs, so the package
imports this module first. In other programs it does nothing.
"""

import os
import sys
from os import _exit  # documented, whatever its name says

try:
    import signal
except KeyboardInterrupt:
    _exit(130)


def _leave(*_: object) -> None:
    if os.isatty(2):
        os.write(2, b"\n")  # the terminal shows ^C, and a prompt comes next
    _exit(130)  # 128 and the number of SIGINT, as shells have it


def end() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_name = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119 - pathlib loads slowly
if _name == "-m" and "-m" in sys.orig_argv:  # and not python -um
    _name = sys.orig_argv[sys.orig_argv.index("-m") + 1].replace("_", "-")
if _name.removesuffix(".exe") == "moondream-async" and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored
):
    signal.signal(signal.SIGINT, _leave)
