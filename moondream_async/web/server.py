"""The server of the page. The API key stays here, and never reaches the browser."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from moondream_async import (
    APIStatusError,
    APITimeoutError,
    MoondreamClient,
    MoondreamError,
    RequestError,
)
from moondream_async._stream.stream import Stream
from moondream_async.simulator.noise import logger
from moondream_async.types import EncodedImage, ImageInput

from .asking import ask, read_question
from .guard import HEADERS, refusal

if TYPE_CHECKING:
    from typing import Self

HOST = "127.0.0.1"
USUAL_PORT = 8020
STATIC = Path(__file__).with_name("static")

# More than any server takes (the cloud: 10 MB), since the client makes pictures smaller.
# The page does not send a larger file.
MAX_BODY_BYTES = 32 * 1024 * 1024

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class About(msgspec.Struct, frozen=True):
    """The facts that the page loads at its start."""

    endpoint: str
    simulated: bool
    model: str | None
    picture: str | None
    max_bytes: int = MAX_BODY_BYTES


class DemoPage:
    """A page on loopback whose questions a client answers.

    The server listens while a page is entered; leaving ends open answers::

        async with MoondreamClient() as client, DemoPage(client, "photo.jpg") as page:
            print(page.url)
            await anyio.sleep_forever()

    Args:
        client: Asks the server. It stays open.
        picture: The first picture.
        name: The picture's file name in the Python program; None is the package's sample.
        simulated: Whether the client's server is a simulator; the page says so.
        model: The client's model, for the Python program.
        port: The port to listen on; 0 is any free port, None is 8020 or a free one.

    Raises:
        ImageError: The picture can't be read; on entering.
        OSError: The server can't listen on the port; on entering.
    """

    def __init__(
        self,
        client: MoondreamClient,
        picture: ImageInput,
        *,
        name: str | None = None,
        simulated: bool = False,
        model: str | None = None,
        port: int | None = None,
    ) -> None:
        self._client = client
        self._given = picture
        self._picture: EncodedImage | None = None
        self._about = About(client.endpoint, simulated, model, name)
        self._port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The address of the page.

        Raises:
            RuntimeError: The server isn't listening.
        """
        if self._runner is None:
            raise RuntimeError("the page isn't served; use `async with DemoPage(...)`")
        return f"http://{HOST}:{self._runner.addresses[0][1]}/"

    async def __aenter__(self) -> Self:
        # Encoded as for a call, the picture is upright and in a format that browsers show.
        self._picture = await self._client.encode_image(self._given)
        # With handler_cancellation, a reader who goes away ends the call to the server at once.
        runner = web.AppRunner(
            self._app(),
            handler_cancellation=True,
            access_log=None,
            logger=logger,
            shutdown_timeout=0.1,
        )
        await runner.setup()
        try:
            await self._listen(runner)
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        return self

    async def _listen(self, runner: web.AppRunner) -> None:
        port = USUAL_PORT if self._port is None else self._port
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError:
            if self._port is not None:
                raise
            await web.TCPSite(runner, HOST, 0).start()

    async def __aexit__(self, *exc_info: object) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answer_for_errors])
        app.on_response_prepare.append(_add_headers)
        app.router.add_get("/", _show_page)
        app.router.add_get("/about", self._tell)
        app.router.add_get("/picture", self._show_picture)
        app.router.add_post("/ask", self._answer)
        app.router.add_static("/static", STATIC)
        return app

    async def _tell(self, _: web.Request) -> web.Response:
        return _json(self._about)

    async def _show_picture(self, _: web.Request) -> web.Response:
        if self._picture is None:
            raise web.HTTPNotFound
        return web.Response(body=self._picture.data, content_type=self._picture.media_type)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        answer = await ask(self._client, *await read_question(request))
        if isinstance(answer, Stream):
            async with answer:
                return await _pass_on(answer, request)
        return _json(answer)


async def _pass_on(stream: Stream, request: web.Request) -> web.StreamResponse:
    """Write a stream's events as they come; a later error is an event, too."""
    events = stream.sse()
    response = web.StreamResponse(headers=events.headers)
    await response.prepare(request)
    async for data in events:
        await response.write(data)
    await response.write_eof()
    return response


async def _show_page(_: web.Request) -> web.FileResponse:
    return web.FileResponse(STATIC / "index.html")


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


@web.middleware
async def _answer_for_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer refused requests, and errors before a stream begins, with a message in JSON."""
    if refused := refusal(request):
        return _error(refused[0], "Refused", refused[1])
    try:
        return await handler(request)
    except web.HTTPRequestEntityTooLarge:
        sentence = f"That is over the {MAX_BODY_BYTES >> 20} MB that this server takes."
        return _error(413, "TooLarge", sentence)
    except web.RequestPayloadError:
        return _error(400, "BadRequest", "What was sent could not be decoded.")
    except web.HTTPException as error:
        return _error(error.status, error.reason, f"{error.reason}: {request.path}")
    except MoondreamError as error:
        return _error(_status(error), type(error).__name__, str(error))


def _status(error: MoondreamError) -> int:
    """Return 400 for a fault of the page, and the server's status or 50x for its own."""
    if isinstance(error, RequestError):
        return 400
    if isinstance(error, APIStatusError) and error.status >= 400:
        return error.status
    return 504 if isinstance(error, APITimeoutError) else 502


def _error(status: int, kind: str, message: str) -> web.Response:
    message = message.encode(errors="replace").decode()  # it may hold raw bytes of a request
    return _json({"error": {"type": kind, "message": message}}, status=status)


def _json(value: object, *, status: int = 200) -> web.Response:
    body = msgspec.json.encode(value)
    return web.Response(body=body, status=status, content_type="application/json")
