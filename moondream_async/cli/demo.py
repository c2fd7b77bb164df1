"""The command ``demo``: a streamed answer for a user who has nothing set up yet."""

from __future__ import annotations

import contextlib
import os
import sys
import webbrowser
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from moondream_async.types import SAMPLE_IMAGE, EncodedImage

from . import _options as options
from ._options import UsageError
from ._output import note, print_pieces, print_text
from ._picture import Wrapper, show_picture, width
from ._session import listening, read_image, run
from ._words import own_name

if TYPE_CHECKING:
    from moondream_async import MoondreamClient


def demo(
    context: typer.Context,
    *,
    image: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE",
            help="The picture's path or web address, or - to read it from stdin; else one that "
            "comes along.",
            show_default=False,
        ),
    ] = None,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a page to ask from, on this machine alone.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="Where --web serves the page; 0 is any free port. [default: 8020, "
            "or any free one where that is taken]",
        ),
    ] = None,
    opens: Annotated[
        bool, typer.Option("--open/--no-open", help="With --web, open the page in the browser.")
    ] = True,
    rate: Annotated[
        float,
        typer.Option(
            metavar="TOKENS_PER_SECOND", min=0, help="The simulator's pace; 0 is without pauses."
        ),
    ] = 20,
    server: options.OfModel,
) -> None:
    """Watch a picture being described; nothing needs to be set up.

    Asks the server that --endpoint or MOONDREAM_ENDPOINT names, or Moondream Cloud
    where MOONDREAM_API_KEY is set. Else it starts a simulator inside itself, which
    runs no model: it describes what it can measure in the picture.

    On a terminal, the picture is shown there, too.

    With --web, it serves a page on this machine until Ctrl-C: to bring a picture,
    ask for any skill, and see what is answered and what was found. The key stays
    with this program.
    """
    if port is not None and not web:
        raise UsageError("'--port' has no effect without '--web'", context)
    if not opens and not web:
        raise UsageError("'--no-open' has no effect without '--web'", context)
    picture = None if image is None else read_image(image)
    endpoint = server.endpoint or os.environ.get("MOONDREAM_ENDPOINT")
    simulated = not endpoint and not os.environ.get("MOONDREAM_API_KEY")
    opened = _opened(server, rate if simulated else None)
    if web:
        run(_serve_page(opened, picture, server.model, port, simulated=simulated, opens=opens))
    else:
        source = picture if isinstance(picture, str) else image
        run(_demo(opened, picture, source, simulated=simulated))


@contextlib.asynccontextmanager
async def _opened(server: options.Server, rate: float | None) -> AsyncIterator[MoondreamClient]:
    """Yield a client of the server; with a `rate`, of a simulator that is started for it."""
    from moondream_async.simulator import Simulator  # noqa: PLC0415 - loads aiohttp

    async with contextlib.AsyncExitStack() as stack:
        if rate is not None:
            simulator = await stack.enter_async_context(Simulator(rate=rate))
            server = replace(server, endpoint=simulator.endpoint)
        yield await stack.enter_async_context(server.client())


async def _demo(
    server: contextlib.AbstractAsyncContextManager[MoondreamClient],
    image: str | bytes | EncodedImage | None,
    source: str | None,
    *,
    simulated: bool,
) -> None:
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    async with server as client:
        _name_server(client, simulated=simulated)
        source = source or "the sample that comes along, md.SAMPLE_IMAGE in Python"
        note(f"Picture: {'from stdin' if source == '-' else source}")
        note("")
        prepared = await client.encode_image(SAMPLE_IMAGE if image is None else image)
        if on_terminal:
            show_picture(prepared)
        async with client.caption(prepared, stream=True) as stream:
            pieces = await print_pieces(stream, Wrapper(width()) if on_terminal else None)
    note("")
    first = "" if stream.ttft is None else f", the first after {stream.ttft:.2f} seconds"
    note(f"Request {stream.request_id or 'without an id'}: {pieces} pieces{first}")
    note("")
    note("Next, in the browser, or with a picture of your own:")
    own = "demo PICTURE" if simulated else "query PICTURE 'What is there to see?'"
    for command in ("demo --web", own):
        note(f"  {own_name()} {command}")
    if simulated:
        note("For a model's answers, set MOONDREAM_API_KEY.")


async def _serve_page(
    server: contextlib.AbstractAsyncContextManager[MoondreamClient],
    image: str | bytes | EncodedImage | None,
    model: str | None,
    port: int | None,
    *,
    simulated: bool,
    opens: bool,
) -> None:
    import anyio  # noqa: PLC0415 - --help and errors of usage do without

    from moondream_async.web import DemoPage  # noqa: PLC0415 - loads aiohttp

    name = None
    if image is not None:
        name = image if isinstance(image, str) else "picture.jpg"  # stdin has no name
    async with server as client:
        page = DemoPage(
            client,
            SAMPLE_IMAGE if image is None else image,
            name=name,
            simulated=simulated,
            model=model,
            port=port,
        )
        async with listening(page, f"port {port}"):
            _name_server(client, simulated=simulated)
            note("Open this page in a browser on this machine; Ctrl-C ends it.")
            print_text(page.url)
            if opens and _has_browser():
                # In a thread: some browsers come back only when they are closed.
                await anyio.to_thread.run_sync(webbrowser.open, page.url, abandon_on_cancel=True)
            await anyio.sleep_forever()


def _has_browser() -> bool:
    """Tell whether a browser with windows is there; one in the terminal would take it over."""
    named = any(os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform in ("darwin", "win32")


def _name_server(client: MoondreamClient, *, simulated: bool) -> None:
    if simulated:
        note(f"No model is looking at the picture: a simulator answers, at {client.endpoint}")
    else:
        note(f"Server: {client.endpoint}")
