"""The commands that find things in a picture: detect, point, segment."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from moondream_async import ImageInput, MoondreamClient, MoondreamError
from moondream_async._stream.kinds import SegmentStream
from moondream_async.results import DetectResult, PointResult, SegmentResult
from moondream_async.types import Settings

from . import _options as options
from ._files import replacing
from ._options import UsageError
from ._output import note, print_events, print_json, print_pieces, print_text
from ._session import at_home, make_client, read_image, run

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")

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
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Find objects in a picture and put a box around each.

    Prints a line for each: left, top, right and bottom, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys objects, request_id,
    finish_reason and metrics.
    """
    save = _check_can_save(context, save)
    picture = read_image(image)
    client = make_client(endpoint=endpoint, model=model, timeout=timeout)
    call = client.detect(picture, object, settings=_limit(max_objects))
    run(_show(client, call, "objects", _box_lines, picture=picture, save=save, as_json=as_json))


def point(
    context: typer.Context,
    *,
    image: options.Image,
    object: Object,
    max_objects: MaxObjects = None,
    save: Save = None,
    as_json: options.AsJson = False,
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Find objects in a picture and put a point in each.

    Prints a line for each: x and y, from 0 to 1 of the picture.

    With --json, the answer is one object with the keys points, request_id,
    finish_reason and metrics.
    """
    save = _check_can_save(context, save)
    picture = read_image(image)
    client = make_client(endpoint=endpoint, model=model, timeout=timeout)
    call = client.point(picture, object, settings=_limit(max_objects))
    run(_show(client, call, "points", _point_lines, picture=picture, save=save, as_json=as_json))


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
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Draw the outline of an object.

    Prints it as SVG path data, from 0 to 1 of the object's box; the box is told on
    stderr, as an SVG transform that puts the outline in its place.

    With --json, the answer is one object with the keys path, bbox, transform,
    parse_error, request_id, finish_reason and metrics. With --json --stream, every
    event is a line as it arrives, and the last is {"event": "final", ...} with these.
    """
    save = _check_can_save(context, save, outlines=True)
    picture = read_image(image)
    client = make_client(endpoint=endpoint, model=model, timeout=timeout)
    if stream:
        call = client.segment(picture, object, stream=True)
        run(_show_outline(client, call, picture=picture, save=save, as_json=as_json))
    else:
        plain = client.segment(picture, object)
        run(_show(client, plain, "path", _path_lines, picture=picture, save=save, as_json=as_json))


async def _show(
    client: MoondreamClient,
    call: Coroutine[Any, Any, Found],
    key: str,
    lines: Callable[[Any], list[str]],
    *,
    picture: ImageInput,
    save: Path | None,
    as_json: bool,
) -> None:
    async with client:
        found = await call
    if as_json:
        print_json(_as_json(found, key))
    else:
        for line in lines(found):
            print_text(line)
        _remark(found)
    if save is not None:
        await _draw(found, picture, save)


async def _show_outline(
    client: MoondreamClient,
    call: Coroutine[Any, Any, SegmentStream],
    *,
    picture: ImageInput,
    save: Path | None,
    as_json: bool,
) -> None:
    async with client, await call as stream:
        await (print_events(stream) if as_json else print_pieces(stream))
        found = SegmentResult(
            path=stream.path or "",
            bbox=stream.bbox,
            parse_error=stream.parse_error,
            request_id=stream.request_id,
            finish_reason=stream.finish_reason,
            metrics=stream.metrics,
        )
    if as_json:
        print_json({"event": "final"} | _as_json(found, "path"))
    else:
        print_text(found.path)
        _remark(found)
    if save is not None:
        await _draw(found, picture, save)


def _as_json(found: Found, key: str) -> dict[str, Any]:
    values: dict[str, Any] = {key: getattr(found, key)}
    if isinstance(found, SegmentResult):
        values |= {"bbox": found.bbox, "transform": found.transform}
        values["parse_error"] = found.parse_error
    return values | {name: found.get(name) for name in ("request_id", "finish_reason", "metrics")}


def _box_lines(found: DetectResult) -> list[str]:
    return [f"{b.x_min:.4f} {b.y_min:.4f} {b.x_max:.4f} {b.y_max:.4f}" for b in found.objects]


def _point_lines(found: PointResult) -> list[str]:
    return [f"{point.x:.4f} {point.y:.4f}" for point in found.points]


def _path_lines(found: SegmentResult) -> list[str]:
    return [found.path]


def _remark(found: Found) -> None:
    """Say what the lines don't."""
    if isinstance(found, SegmentResult):
        if found.transform is not None:
            note(f"Transform: {found.transform}")
        if found.parse_error is not None:
            note(f"The server could not read all of the outline: {found.parse_error}")
    elif not (found.objects if isinstance(found, DetectResult) else found.points):
        note("Nothing found.")


def _limit(max_objects: int | None) -> Settings | None:
    return None if max_objects is None else {"max_objects": max_objects}


def _check_can_save(
    context: typer.Context, save: Path | None, *, outlines: bool = False
) -> Path | None:
    """Refuse before anything is asked what could not be written afterwards."""
    if save is None:
        return None
    save = Path(at_home(str(save)))
    if save.suffix.lower() not in _PICTURES:
        raise UsageError(f"--save takes a file that ends in {', '.join(_PICTURES)}", context)
    if not save.parent.is_dir():
        raise UsageError(f"--save: there is no folder {save.parent}", context)
    if outlines and find_spec("svg") is None:
        raise MoondreamError("--save of an outline needs: pip install 'moondream-async[cli]'")
    return save


async def _draw(found: Found, picture: ImageInput, path: Path) -> None:
    """Write the picture with what was found; the file there stays until the new one is whole."""
    from asyncio import to_thread  # noqa: PLC0415 - --help does without

    drawn = await to_thread(found.draw, picture)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper()
    with replacing(path) as file:
        await to_thread(drawn.save, file, kind)
    note(f"Drawn: {path}")
