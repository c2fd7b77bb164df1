"""The command ``demo``: a streamed answer for somebody who has nothing set up yet."""

from __future__ import annotations

import contextlib
import os
from typing import Annotated

import typer

from . import _options as options
from ._output import note, print_pieces
from ._session import make_client, read_image, run


def demo(
    *,
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="The picture's path, or - to read it from stdin; else one that comes along.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float,
        typer.Option(
            metavar="TOKENS_PER_SECOND", min=0, help="The simulator's pace; 0 is without pauses."
        ),
    ] = 20,
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Watch a picture being described; nothing needs to be set up.

    Asks the server that --endpoint or MOONDREAM_ENDPOINT names, or Moondream Cloud
    where MOONDREAM_API_KEY is set. Else it starts a simulator inside itself, which
    runs no model: it describes what it can measure in the picture.
    """
    picture = None if image is None else read_image(image)
    run(_demo(picture, rate, endpoint or os.environ.get("MOONDREAM_ENDPOINT"), model, timeout))


async def _demo(
    image: str | bytes | None,
    rate: float,
    endpoint: str | None,
    model: str | None,
    timeout: float | None,
) -> None:
    from moondream_async.simulator import SAMPLE_IMAGE, Simulator  # noqa: PLC0415 - loads aiohttp

    simulated = not endpoint and not os.environ.get("MOONDREAM_API_KEY")
    async with contextlib.AsyncExitStack() as stack:
        if simulated:
            endpoint = (await stack.enter_async_context(Simulator(rate=rate))).endpoint
        client = await stack.enter_async_context(
            make_client(endpoint=endpoint, model=model, timeout=timeout)
        )
        if simulated:
            note(f"No model is looking at the picture: a simulator answers, at {endpoint}")
        else:
            note(f"Server: {client.endpoint}")
        if image is None:
            note(f"Picture: {SAMPLE_IMAGE} (comes with moondream-async)")
        else:
            note(f"Picture: {image if isinstance(image, str) else 'from stdin'}")
        note("")
        async with client.caption(SAMPLE_IMAGE if image is None else image, stream=True) as stream:
            pieces = await print_pieces(stream)
    note("")
    first = "" if stream.ttft is None else f", the first after {stream.ttft:.2f} seconds"
    note(f"Request {stream.request_id or 'without an id'}: {pieces} pieces{first}")
    if simulated:
        note("Next: set MOONDREAM_API_KEY and run it again, or: moondream-async demo PICTURE")
        note("To try programs of your own with the simulator: moondream-async serve")
    else:
        note("Next: moondream-async query PICTURE 'What is there to see?'")
