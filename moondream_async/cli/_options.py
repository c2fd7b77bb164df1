"""The options that commands share, each declared once, and the error for wrong ones."""

from __future__ import annotations

import re
from typing import Annotated, cast

import typer

UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""The root of typer's errors of usage, made of a message and a context.

typer exports only the kind below it, and has it from click or from itself, as the version is.
"""


def check_positive(value: float | None) -> float | None:
    """Refuse what is not over 0."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} is not over 0.")
    return value


def _seconds(value: str) -> float:
    """Read a time as people write it.

    >>> _seconds("1s"), _seconds("0.5"), _seconds("200ms"), _seconds("2m")
    (1.0, 0.5, 0.2, 120.0)
    """
    number, unit = re.fullmatch(r"\s*(.*?)\s*(ms|s|m|)\s*", value, re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        seconds = float(number) * {"ms": 1e-3, "m": 60.0}.get(unit, 1.0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise typer.BadParameter(f"{value!r} is no time over 0, as 1s or 0.5s.")
    return seconds


Image = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="The picture's path or web address, or - to read it from stdin.",
        show_default=False,
    ),
]

Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The server's address, with its /v1. [default: MOONDREAM_ENDPOINT, "
        "else Moondream Cloud]",
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="The model. [default: the server's]")
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        callback=check_positive,
        help="Give up when the answer is not complete by then. [default: after 120 seconds "
        "without a beginning, or 60 without going on]",
    ),
]

Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Print the answer as it is written, or when it is complete. "
        "[default: --stream; with --json, --no-stream]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]

MaxTokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Cut the answer after so many tokens."),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", min=0, help="How freely words are chosen; 0 is not at all."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        max=1,
        callback=check_positive,
        help="Choose only among the likeliest words, which make up this share.",
    ),
]

Every = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=_seconds,
        help="Time between two frames of a video, as 1s or 0.5s. [default: all frames]",
    ),
]
