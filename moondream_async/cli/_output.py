"""What commands print: answers on stdout, remarks about them on stderr.

A terminal obeys control characters, and a server's answer may contain them: a picture can
have them written on it. Every command prints through this file: `print_text` and `note`
replace control characters, `encode_json` escapes them.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import typer

from moondream_async._stream.stream import Stream
from moondream_async.results import (
    BboxEvent,
    FinalEvent,
    MetricsEvent,
    Point,
    ReasoningEvent,
    Region,
    StreamEvent,
    UnknownEvent,
)

if TYPE_CHECKING:
    from ._picture import Wrapper

# Control characters, and characters that change the direction in which a line is read.
_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_OBEYED = {*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS} - {ord("\n"), ord("\t")}
_REPLACED = dict.fromkeys(_OBEYED, "\N{REPLACEMENT CHARACTER}")

# In JSON these characters are escaped, too: invisible ones, and halves of surrogate pairs,
# for which UTF-8 has no bytes. (JSON's own rules escape all below 0x20.)
_ESCAPED = re.compile(
    "[\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

EMPTY = "The answer is empty."
"""The remark about a caption or a reply without text."""


def one_line(text: str) -> str:
    r"""Return a text in one line, without control characters.

    >>> one_line("Bad\n gateway\x1b[2J")
    'Bad gateway [2J'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def note(text: str) -> None:
    """Print a remark, in one line on stderr; dimmed on a terminal."""
    from rich.console import Console  # noqa: PLC0415 - is not needed for most commands

    console = Console(stderr=True, highlight=False)
    console.print(one_line(text), style="dim", markup=False, emoji=False, soft_wrap=True)


def encode_json(value: Any) -> bytes:
    r"""Return a value as a line of JSON, in UTF-8, which is safe to show on a terminal.

    >>> encode_json({"caption": "a\x9b2J \u202e cat"})
    b'{"caption":"a\\u009b2J \\u202e cat"}'
    """
    return _ESCAPED.sub(lambda found: json.dumps(found[0])[1:-1], json_text(value)).encode()


def json_text(value: Any) -> str:
    """Return a value as JSON; halves of surrogate pairs stay in it as they are.

    What JSON has no form for, as a table may hold it, is a text.

    >>> json_text({"at": 1j})
    '{"at":"1j"}'
    """
    try:
        return msgspec.json.encode(value, enc_hook=str).decode()
    except UnicodeEncodeError:  # half a surrogate pair
        plain = msgspec.to_builtins(value, enc_hook=str)
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def print_json(value: Any) -> None:
    """Print a value as one line of JSON: UTF-8, whatever the locale."""
    typer.echo(encode_json(value))


def print_text(text: str, *, end: str = "\n") -> None:
    """Print a text, at once; a terminal gets it without control characters."""
    if sys.stdout is not None and sys.stdout.isatty():  # None: it is closed
        text = text.replace("\r\n", "\n").translate(_REPLACED)
    typer.echo(text + end, nl=False, color=True)  # True: typer changes no text


def coordinates(place: Region | Point) -> str:
    """Return a box or a point as it is printed: its numbers, from 0 to 1 of the picture."""
    names = ("x_min", "y_min", "x_max", "y_max") if isinstance(place, Region) else ("x", "y")
    return " ".join(f"{getattr(place, name):.4f}" for name in names)


async def print_pieces(stream: Stream, wrapper: Wrapper | None = None) -> int:
    """Print a stream's pieces as they arrive, wrapped or as they are; return how many there were.

    The last line is ended also where the stream fails or is cancelled.
    """
    count = 0
    piece = ""
    try:
        async for piece in stream.chunk:
            print_text(piece if wrapper is None else wrapper.feed(piece), end="")
            count += 1
    finally:
        if wrapper is not None:
            print_text(wrapper.end())
        elif piece and not piece.endswith("\n"):
            typer.echo()
    return count


async def print_events(stream: Stream) -> None:
    """Print a stream's events as they arrive, each as a line of JSON; all but the final one."""
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
