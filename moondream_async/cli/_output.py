"""What commands print: answers on stdout, all that is said about them on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import typer

from moondream_async._streams import Stream
from moondream_async.types import (
    BboxEvent,
    FinalEvent,
    MetricsEvent,
    ReasoningEvent,
    StreamEvent,
    UnknownEvent,
)

# A terminal obeys these, and what a model says may come from the picture.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def one_line(text: str) -> str:
    r"""Return a text in one line, without characters that a terminal would obey.

    >>> one_line("Bad\n gateway\x1b[2J")
    'Bad gateway [2J'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once it is whole, and otherwise never was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def note(text: str) -> None:
    """Print a line that is not part of the answer: on stderr, dimmed on a terminal."""
    from rich.console import Console  # noqa: PLC0415 - is not needed for most commands

    console = Console(stderr=True, highlight=False)
    console.print(one_line(text), style="dim", markup=False, emoji=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON: UTF-8, whatever the locale."""
    typer.echo(msgspec.json.encode(value))


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a text, at once; on a terminal without the characters that it would obey."""
    if sys.stdout is not None and sys.stdout.isatty():  # None: it is closed
        text = text.translate(_CONTROLS)
    typer.echo(text + end, nl=False, color=True)  # True: elsewhere, the text is left as it is


async def print_pieces(stream: Stream) -> int:
    """Print a stream's pieces as they arrive; return how many there were.

    The line is ended, whatever ends the stream.
    """
    count = 0
    text = ""
    try:
        async for piece in stream.chunk:
            text = piece
            print_text(piece, end="")
            count += 1
    finally:
        if text and not text.endswith("\n"):
            typer.echo()
    return count


async def print_events(stream: Stream) -> None:
    """Print a stream's events as they arrive, each a line of JSON; all but the end of it."""
    async for event in stream.events:
        if event.chunk or not isinstance(event, FinalEvent):
            print_json(_describe(event))


def _describe(event: StreamEvent) -> dict[str, Any]:
    if isinstance(event, UnknownEvent):
        return {"event": "unknown", "name": event.event, "raw": event.raw}
    if isinstance(event, BboxEvent):
        return {"event": "bbox", "bbox": event.bbox}
    if isinstance(event, ReasoningEvent):
        return {"event": "reasoning", "text": event.text}
    if isinstance(event, MetricsEvent):
        return {"event": "metrics", "metrics": event.metrics}
    return {"event": "chunk", "chunk": event.chunk}
