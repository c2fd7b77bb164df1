"""The commands that ask about one picture, and what the server offers."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, cast

import typer

from moondream_async import MoondreamClient
from moondream_async._stream.stream import Stream
from moondream_async.results import Result
from moondream_async.types import Length
from moondream_async.types import Settings as Sent

from . import _options as options
from ._options import UsageError
from ._output import note, print_events, print_json, print_pieces, print_text
from ._session import read_image, run

_ABOUT_IT = ("request_id", "finish_reason", "metrics", "ttft")


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
    client = server.client()
    answer = client.caption(
        read_image(image),
        length=length,
        stream=_is_streamed(stream=stream, as_json=as_json),
        settings=cast("Sent | None", settings),
    )
    run(_show(client, answer, ("caption", *_ABOUT_IT), as_json=as_json))


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
    client = server.client()
    answer = client.query(
        None if no_image else read_image(image),
        question,
        stream=_is_streamed(stream=stream, as_json=as_json),
        reasoning=reasoning,
        settings=cast("Sent | None", settings),
    )
    run(_show(client, answer, ("answer", "reasoning", *_ABOUT_IT), as_json=as_json))


def models(*, as_json: options.AsJson = False, server: options.OfServer) -> None:
    """List the models that the server offers, a line each.

    With --json, a line is an object as the server sent it.
    """
    run(_models(server.client(), as_json=as_json))


async def _show(
    client: MoondreamClient,
    call: Coroutine[Any, Any, Result | Stream],
    keys: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Print the answer of a call. The first of `keys` is its text; the others go into JSON."""
    async with client:
        answer = await call
        if isinstance(answer, Stream):
            async with answer:
                await (print_events(answer) if as_json else print_pieces(answer))
            text = answer.text_so_far
        else:
            text = str(answer.get(keys[0]))
            if not as_json:
                print_text(text)
    if as_json:
        values = {name: getattr(answer, name, None) for name in keys}
        last = {"event": "final"} if isinstance(answer, Stream) else {}
        print_json(last | values | {keys[0]: text})
    elif reasoning := getattr(answer, "reasoning", None):
        note(f"Reasoning: {reasoning.text}")


def _is_streamed(*, stream: bool | None, as_json: bool) -> bool:
    # A plain answer tells more of itself than a stream does on some servers, and a program
    # that reads one object has no use for its pieces.
    return not as_json if stream is None else stream


async def _models(client: MoondreamClient, *, as_json: bool) -> None:
    async with client:
        for model in await client.models():
            if as_json:
                print_json(model.raw)
            else:
                said = [model.id, model.name, model.description]
                print_text("  ".join(each for each in said if each))
