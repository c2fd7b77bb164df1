"""The commands that find things in a picture: detect, point, segment."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from moondream_async import ImageInput, MoondreamClient, MoondreamError
from moondream_async._stream.kinds import SegmentStream
from moondream_async.results import DetectResult, PointResult, SegmentResult

from . import _options as options
from ._files import replacing
from ._options import UsageError
from ._output import coordinates, note, print_events, print_json, print_pieces, print_text
from ._session import at_home, read_image, run

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_ABOUT_IT = ("request_id", "finish_reason", "metrics")
_KEYS = {
    "detect": ("objects", *_ABOUT_IT),
    "point": ("points", *_ABOUT_IT),
    "segment": ("path", "bbox", "transform", "parse_error", *_ABOUT_IT),
}
"""What a skill's answer has in JSON."""

Found = DetectResult | PointResult | SegmentResult

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


def detect(
    context: typer.Context,
    *,
    image: options.Image,
    object: Object,
    max_objects: MaxObjects = None,
    save: Save = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Find objects in a picture and put a box around each.

    Prints a line for each: left, top, right and bottom, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys objects, request_id,
    finish_reason and metrics.
    """
    _find(context, server, image, object, save, as_json=as_json, settings=_limit(max_objects))


def point(
    context: typer.Context,
    *,
    image: options.Image,
    object: Object,
    max_objects: MaxObjects = None,
    save: Save = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Find objects in a picture and put a point in each.

    Prints a line for each: x and y, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys points, request_id,
    finish_reason and metrics.
    """
    _find(context, server, image, object, save, as_json=as_json, settings=_limit(max_objects))


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

    Prints it as SVG path data, from 0 to 1 of the object's box; the box is told on
    stderr, as an SVG transform that puts the outline in its place.

    With --json, the answer is one object with the keys path, bbox, transform,
    parse_error, request_id, finish_reason and metrics. With --json --stream, every
    event is a line as it arrives, and the last is {"event": "final", ...} with these.
    """
    _find(context, server, image, object, save, as_json=as_json, stream=stream)


def _limit(max_objects: int | None) -> dict[str, int] | None:
    return None if max_objects is None else {"max_objects": max_objects}


def _find(
    context: typer.Context,
    server: options.OfModel,
    image: str,
    object: str,
    save: Path | None,
    *,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Run the skill that the command is named after."""
    skill = str(context.command.name)
    if save is not None:
        save = _checked(context, save)
    if save is not None and skill == "segment" and find_spec("svg") is None:
        raise MoondreamError("--save of an outline needs: pip install 'moondream-async[cli]'")
    picture = read_image(image)
    client = server.client()
    call = getattr(client, skill)(picture, object, **arguments)
    run(_show(client, call, _KEYS[skill], picture, save, as_json=as_json))


def _checked(context: typer.Context, save: Path) -> Path:
    """Refuse, before the server is asked, a file that could not be written afterwards."""
    save = Path(at_home(str(save)))
    if save.suffix.lower() not in _PICTURES:
        raise UsageError(f"--save takes a file that ends in {', '.join(_PICTURES)}", context)
    if not save.parent.is_dir():
        raise UsageError(f"--save: there is no folder {save.parent}", context)
    return save


async def _show(
    client: MoondreamClient,
    call: Any,
    keys: tuple[str, ...],
    picture: ImageInput,
    save: Path | None,
    *,
    as_json: bool,
) -> None:
    last = {}
    async with client:
        found = await call
        if isinstance(found, SegmentStream):
            last = {"event": "final"}
            async with found as stream:
                await (print_events(stream) if as_json else print_pieces(stream))
                found = await stream.result()
    if as_json:
        print_json(last | {name: getattr(found, name) for name in keys})
    else:
        _print(found)
    if save is not None:
        await _draw(found, picture, save)


def _print(found: Found) -> None:
    if isinstance(found, SegmentResult):
        print_text(found.path)
        if found.transform is not None:
            note(f"Transform: {found.transform}")
        if found.parse_error is not None:
            note(f"The server could not read all of the outline: {found.parse_error}")
        return
    places = found.objects if isinstance(found, DetectResult) else found.points
    for place in places:
        print_text(coordinates(place))
    if not places:
        note("Nothing found.")


async def _draw(found: Found, picture: ImageInput, path: Path) -> None:
    """Write the picture with the marks over it; the file there stays until the new one is whole."""
    from asyncio import to_thread  # noqa: PLC0415 - --help does without

    drawn = await to_thread(found.draw, picture)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper()
    with replacing(path) as file:
        await to_thread(drawn.save, file, kind)
    note(f"Drawn: {path}")
