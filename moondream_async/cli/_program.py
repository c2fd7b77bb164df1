"""The program: its commands, and the exit status and the line on stderr for each error.

Every error is one line on stderr. typer's own way to end a program would print
several lines, so commands are invoked here without it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from moondream_async._version import __version__
from moondream_async.errors import MoondreamError

from . import batch, chat, demo, serve, skills, watch
from ._options import UsageError, expand
from ._output import one_line
from ._words import NAME, in_words, own_name
from .bulk import command as bulk

_COMPLETE = "_MOONDREAM_ASYNC_COMPLETE"
_OF_ONE_PICTURE = ("caption", "query", "detect", "point", "segment", "demo")

app = typer.Typer(
    rich_markup_mode=None,  # help without boxes: it is piped, searched and read in narrow windows
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    demo.demo,
    skills.caption,
    skills.query,
    skills.detect,
    skills.point,
    skills.segment,
    chat.chat,
    skills.models,
    bulk.bulk,
    watch.watch,
    serve.serve,
):
    app.command()(expand(_command))
app.add_typer(batch.app, name="batch")


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer passes it like this
    if wanted:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    *,
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    _verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what the client does, a line each. Goes anywhere."
        ),
    ] = False,
) -> None:
    """Ask Moondream about pictures, and read the answers as they are written.

    The API key is taken from the environment variable MOONDREAM_API_KEY. A server
    other than Moondream Cloud is named with --endpoint or MOONDREAM_ENDPOINT, and
    may need no key.

    To see it work without either: moondream-async demo
    """


def run(args: Sequence[str]) -> int:
    """Run a command line, or the help where it is empty; return the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what a terminal can't show is no failure
    command = typer.main.get_command(app)
    if _COMPLETE in os.environ:  # a shell asks what can be typed
        command.main(list(args), prog_name=NAME)
    status = 0
    args, verbose = _without_verbose(args)
    try:
        with (
            _logging() if verbose else contextlib.nullcontext(),
            command.make_context(NAME, args or ["--help"]) as context,
        ):
            command.invoke(context)
    except typer.Exit as end:
        status = end.exit_code
    except UsageError as error:
        path = NAME if error.ctx is None else error.ctx.command_path
        said = error.format_message().rstrip(".")
        _complain(f"{said}{_hint(error)} (see {path} --help)")
        status = 2
    except MoondreamError as error:
        _complain(in_words(error))
        status = 1
    except BrokenPipeError:
        _abandon_stdout()
        status = 141  # 128 and the number of SIGPIPE, which ends other programs in this place
    except OSError as error:
        _abandon_stdout()
        _complain(str(error))
        status = 1
    return status


def _hint(error: typer.BadParameter) -> str:
    """Name ``bulk`` to a user who gives several pictures to a command for one."""
    extra = "unexpected extra argument" in error.format_message()
    if extra and error.ctx is not None and error.ctx.command.name in _OF_ONE_PICTURE:
        return f"; for several pictures there is: {own_name()} bulk PATHS... -o FILE"
    return ""


def _without_verbose(args: Sequence[str]) -> tuple[list[str], bool]:
    """Take ``-v`` out, which may stand before a command or behind it."""
    end = args.index("--") if "--" in args else len(args)
    kept = [each for each in args[:end] if each not in ("-v", "--verbose")]
    return [*kept, *args[end:]], len(kept) < end


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Write the package's log lines to stderr, each of them one line."""
    logger = logging.getLogger("moondream_async")
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    handler.format = lambda record: one_line(plain.format(record))  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # with stderr closed, the exit status has to say it
        typer.echo(f"{NAME}: {one_line(message)}", err=True)


def _abandon_stdout() -> None:
    """Send unwritten output to /dev/null: at its end the interpreter would fail to write it."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
