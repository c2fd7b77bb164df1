"""The command ``watch``: the same question about moving pictures, and a line for each answer."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    ImageError,
    MoondreamError,
    RateLimitError,
)

from . import _options as options
from ._options import UsageError
from ._output import EMPTY, coordinates, note, one_line, print_json, print_text
from ._session import at_home, run
from ._words import in_words

if TYPE_CHECKING:
    from moondream_async import MoondreamClient
    from moondream_async.frames import MJPEGSource, Source
    from moondream_async.watch import Frame, WatchResult

_STREAMED = re.compile(r"(rtsps?|rtmps?|srt)://", re.IGNORECASE)


def watch(
    context: typer.Context,
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A video file, which is played at its own speed; the http or https address of "
            "a camera that sends Motion JPEG; an rtsp address; camera:0 for this computer's "
            "first camera; or screen.",
            show_default=False,
        ),
    ],
    asked: options.Asked,
    every: options.Every = None,
    max_age: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            callback=options.check_positive,
            help="Drop answers about frames that are older than that.",
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many frames may be asked about at once.")
    ] = 1,
    settings: options.Settings,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Ask the same about moving pictures, again and again: the newest frame wins.

    Prints a line for each answer: the frame's time in the source, how old the frame is
    by now, and the answer. Boxes are left, top, right and bottom, points x and y, from
    0 to 1 of the picture. Frames that failed are reported on stderr, and the next is
    asked about.

    With --json, each is an object with the keys index (of the frame), time, taken_at
    (seconds since 1970), age, skipped (frames since the line before) and the answer's
    own, or error.

    It ends with the video, or with Ctrl-C. The exit status is 1 when nothing was answered.
    """
    skill, arguments = asked
    options.check_asked(context, skill, arguments)
    pictures = _open(context, source, every)
    arguments |= {"settings": settings, "max_age": max_age, "in_flight": in_flight}
    run(_watch(server.client(), pictures, skill, arguments, every, as_json=as_json))


def _open(context: typer.Context, source: str, every: float | None) -> Source | MJPEGSource:
    """Return the source that SOURCE names, not opened yet."""
    from moondream_async import frames  # noqa: PLC0415 - --help does without

    path = at_home(source)
    if os.path.lexists(path):
        return frames.video(path, every=every, live=True)
    if source.lower().startswith(("http://", "https://")):
        return frames.mjpeg(source)
    if _STREAMED.match(source):
        return frames.video(source, every=every)
    if found := re.fullmatch(r"camera(?::(\d{1,4}))?", source):
        return frames.camera(int(found[1] or 0), fps=1 / every if every else None)
    if source == "screen":
        return frames.screen(fps=1 / every if every else 10.0)
    if "://" in source or source.startswith("camera:"):
        raise UsageError(
            f"'{source}' is no SOURCE: a video file, http://..., rtsp://..., camera:0 or screen",
            context,
        )
    raise MoondreamError(f"There is no file {source}")


async def _watch(
    client: MoondreamClient,
    source: Source | MJPEGSource,
    skill: str,
    arguments: dict[str, Any],
    every: float | None,
    *,
    as_json: bool,
) -> None:
    answered = False
    async with (
        client,
        _opened(source) as pictures,
        contextlib.aclosing(_seldom(pictures, every)) as frames,
        client.watch(frames, skill, **arguments) as answers,
    ):
        async for each in answers:
            if each.error is not None and not answered and _is_hopeless(each.error):
                raise each.error
            answered = answered or each.ok
            if as_json:
                print_json(_as_json(each))
            elif each.error is not None:
                note(f"{each.frame.time:.3f} s: {in_words(each.error)}")
            else:
                age, text = each.age, one_line(_text(each.result))
                print_text(f"{each.frame.time:.3f} s, {age:.2f} s old: {text}")
    if not answered:
        raise typer.Exit(1)


@contextlib.asynccontextmanager
async def _opened(source: Source | MJPEGSource) -> AsyncIterator[AsyncIterator[Frame]]:
    """Open a source; a camera that can't be reached says nothing of a server to start."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            pictures: AsyncIterator[Frame] = await stack.enter_async_context(source)
        except APIConnectionError as error:
            raise ImageError(str(error)) from error
        yield pictures


async def _seldom(frames: AsyncIterator[Frame], every: float | None) -> AsyncGenerator[Frame, None]:
    """Pass frames on, `every` seconds one; not all sources can be opened with such a pause."""
    due = float("-inf")
    async for frame in frames:
        if every is None or frame.time >= due - 1e-6:
            due = frame.time + (every or 0)
            yield frame


def _is_hopeless(error: MoondreamError) -> bool:
    """Tell whether the next frame would fail in the same way, where none was answered yet."""
    if isinstance(error, APIStatusError):
        return error.status < 500 and not isinstance(error, RateLimitError)
    return isinstance(error, APIConnectionError) and not isinstance(error, APITimeoutError)


def _as_json(each: WatchResult[Frame, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"index": each.frame.index, "time": each.frame.time}
    said |= {"taken_at": each.taken_at, "age": round(each.age, 4), "skipped": each.skipped}
    if each.error is not None:
        kind, message = type(each.error).__name__, in_words(each.error)
        return said | {"error": {"type": kind, "message": message}}
    return said | dict(each.result or {})


def _text(result: Any) -> str:
    """Return an answer as a text."""
    for name in ("caption", "answer"):
        if name in result:
            return str(result[name]) or EMPTY
    places = result.get("objects", result.get("points", ()))
    return "; ".join(map(coordinates, places)) or result.get("path") or "nothing found"
