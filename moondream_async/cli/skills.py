"""The commands that ask about one picture, and what the server offers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from moondream_async import ImageInput, MoondreamClient, MoondreamError
from moondream_async._stream.kinds import SegmentStream
from moondream_async._stream.stream import Stream
from moondream_async.results import CaptionResult, QueryResult, SegmentResult
from moondream_async.types import Length

from . import _options as options
from ._files import replacing
from ._options import UsageError
from ._output import EMPTY, coordinates, note, print_events, print_json, print_pieces, print_text
from ._session import at_home, read_image, run

_ABOUT_IT = ("request_id", "finish_reason", "metrics")
_KEYS = {
    "caption": ("caption", *_ABOUT_IT, "ttft"),
    "query": ("answer", "reasoning", *_ABOUT_IT, "ttft"),
    "detect": ("objects", *_ABOUT_IT),
    "point": ("points", *_ABOUT_IT),
    "segment": ("path", "bbox", "transform", "parse_error", *_ABOUT_IT),
}
"""The keys of a skill's answer in JSON; the first one is the answer itself."""
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Object = Annotated[
    str,
    typer.Argument(metavar="OBJECT", help="What to look for, as 'red car'.", show_default=False),
]
MaxObjects = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Stop after so many. [default: the server's]")
]
Save = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=f"Draw what was found over the picture and write it there ({', '.join(_PICTURES)}).",
        show_default=False,
    ),
]


def caption(
    *,
    image: options.Image,
    length: Annotated[Length, typer.Option(help="How much to say.")] = "normal",
    settings: options.Settings,
    stream: options.Stream = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Describe a picture.

    With --json, the answer is one object with the keys caption, request_id,
    finish_reason, metrics and ttft (seconds until a stream's first piece). What the
    server does not say is null.

    With --json --stream, every event is a line as it arrives: {"event": "chunk",
    "chunk": ...}, {"event": "metrics", "metrics": ...} or {"event": "unknown",
    "name": ..., "raw": ...}; the last is {"event": "final", ...} with the keys above.
    """
    asked: dict[str, Any] = {"length": length, "settings": settings}
    asked["stream"] = _is_streamed(stream=stream, as_json=as_json)
    run(_ask(server.client(), "caption", read_image(image), as_json=as_json, **asked))


def query(
    context: typer.Context,
    *,
    image: options.Image,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="The question.", show_default=False),
    ] = None,
    no_image: Annotated[
        bool, typer.Option("--no-image", help="Ask without a picture: give only QUESTION.")
    ] = False,
    reasoning: options.Reasoning = None,
    settings: options.Settings,
    stream: options.Stream = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Answer a question about a picture.

    With --json, the answer is one object with the keys answer, reasoning (an object
    with text and grounding), request_id, finish_reason, metrics and ttft (seconds
    until a stream's first piece). What the server does not say is null.

    With --json --stream, every event is a line as it arrives: {"event": "chunk",
    "chunk": ...}, {"event": "metrics", "metrics": ...} or {"event": "unknown",
    "name": ..., "raw": ...}; the last is {"event": "final", ...} with the keys above.
    """
    if no_image:
        if question is not None:
            raise UsageError("With '--no-image', give only a QUESTION", context)
        question = image
    elif question is None:
        raise UsageError("Missing argument 'QUESTION'", context)
    asked: dict[str, Any] = {"question": question, "reasoning": reasoning, "settings": settings}
    asked["stream"] = _is_streamed(stream=stream, as_json=as_json)
    client = server.client()
    picture = None if no_image else read_image(image)
    run(_ask(client, "query", picture, as_json=as_json, **asked))


def _sought(
    *, context: typer.Context, object: Object, max_objects: MaxObjects = None, save: Save = None
) -> dict[str, Any]:
    settings = None if max_objects is None else {"max_objects": max_objects}
    return {"object": object, "settings": settings, "save": _checked(context, save)}


Sought = Annotated[dict[str, Any], options.Group(_sought)]
"""What to look for, and where to draw what was found."""


def detect(
    *,
    image: options.Image,
    sought: Sought,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Find objects in a picture and put a box around each.

    Prints a line for each: left, top, right and bottom, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys objects, request_id,
    finish_reason and metrics.
    """
    run(_ask(server.client(), "detect", read_image(image), as_json=as_json, **sought))


def point(
    *,
    image: options.Image,
    sought: Sought,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Find objects in a picture and put a point in each.

    Prints a line for each: x and y, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys points, request_id,
    finish_reason and metrics.
    """
    run(_ask(server.client(), "point", read_image(image), as_json=as_json, **sought))


def segment(
    context: typer.Context,
    *,
    image: options.Image,
    object: Object,
    save: Save = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Print the pieces of a first, coarse outline as they are drawn, and the "
            "refined one on a line of its own.",
        ),
    ] = False,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Draw the outline of an object.

    Prints it as SVG path data, from 0 to 1 of the object's box; the box is printed
    on stderr, as an SVG transform that puts the outline in its place.

    With --json, the answer is one object with the keys path, bbox, transform,
    parse_error, request_id, finish_reason and metrics. With --json --stream, every
    event is a line as it arrives, and the last is {"event": "final", ...} with these.
    """
    save = _checked(context, save)
    if save is not None and find_spec("svg") is None:
        raise MoondreamError("--save of an outline needs: pip install 'moondream-async[cli]'")
    asked: dict[str, Any] = {"object": object, "stream": stream}
    run(_ask(server.client(), "segment", read_image(image), as_json=as_json, save=save, **asked))


def _checked(context: typer.Context, save: Path | None) -> Path | None:
    """Refuse, before the server is asked, a file that could not be written afterwards."""
    if save is None:
        return None
    save = Path(at_home(str(save)))
    if save.suffix.lower() not in _PICTURES:
        raise UsageError(f"--save takes a file that ends in {', '.join(_PICTURES)}", context)
    if not save.parent.is_dir():
        raise UsageError(f"--save: there is no folder {save.parent}", context)
    if save.is_dir() or not os.access(save.parent, os.W_OK):
        raise UsageError(f"--save: {save} can't be written", context)
    return save


async def models(*, as_json: options.AsJson = False, client: options.Client) -> None:
    """List the models that the server offers, a line each.

    With --json, a line is an object as the server sent it.
    """
    for model in await client.models():
        if as_json:
            print_json(model.raw)
        else:
            said = [model.id, model.name, model.description]
            print_text("  ".join(each for each in said if each))


async def _ask(
    client: MoondreamClient,
    skill: str,
    picture: Any,
    *,
    as_json: bool,
    save: Path | None = None,
    **asked: Any,
) -> None:
    """Ask, and print the answer; a stream is printed as it arrives."""
    async with client:
        answer = result = await getattr(client, skill)(picture, **asked)
        if isinstance(answer, Stream):
            async with answer:
                await (print_events(answer) if as_json else print_pieces(answer))
                result = await answer.result()
    keys = _KEYS[skill]
    if as_json:
        last = {"event": "final"} if isinstance(answer, Stream) else {}
        said = {name: getattr(result, name, getattr(answer, name, None)) for name in keys}
        print_json(last | said)
    else:
        if not isinstance(answer, Stream) or isinstance(answer, SegmentStream):
            for line in _lines(result.get(keys[0])):
                print_text(line)
        for remark in _remarks(result, result.get(keys[0])):
            note(remark)
    if save is not None:
        await _draw(result, picture, save)


def _lines(answer: Any) -> list[str]:
    if isinstance(answer, list):
        return [coordinates(place) for place in answer]
    return [str(answer)] if answer else []


def _remarks(result: Any, answer: Any) -> Iterator[str]:
    if isinstance(result, SegmentResult):
        if result.transform is not None:
            yield f"Transform: {result.transform}"
        if result.parse_error is not None:
            yield f"The server could not read all of the outline: {result.parse_error}"
            return
    elif reasoning := getattr(result, "reasoning", None):
        yield f"Reasoning: {reasoning.text}"
    if not answer:
        yield EMPTY if isinstance(result, (CaptionResult, QueryResult)) else "Nothing found."


async def _draw(found: Any, picture: ImageInput, path: Path) -> None:
    """Write the picture with the marks over it; the file there stays until the new one is whole."""
    from asyncio import to_thread  # noqa: PLC0415 - --help does without

    drawn = await to_thread(found.draw, picture)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper()
    with replacing(path) as file:
        await to_thread(drawn.save, file, kind)
    note(f"Drawn: {path}")


def _is_streamed(*, stream: bool | None, as_json: bool) -> bool:
    # Some servers send more keys in a plain answer than in a stream, and a program that reads
    # one object has no use for pieces.
    return not as_json if stream is None else stream
