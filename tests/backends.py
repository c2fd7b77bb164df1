"""The same small web backend in several frameworks, and the servers that they run under.

Each backend answers ``/ask`` with a stream as events, ``/text`` with one as plain text, and
``/restless`` with events and a heartbeat every moment; each holds one client, from its
start to its end. The first part of some, up to the line, stands in README.md.
"""

import asyncio
import contextlib
import socket

import pytest

NEEDS = "needs: python -m pip install '.[foreign]'"


# -- backends -----------------------------------------------------------------------------


def fastapi():
    from contextlib import asynccontextmanager

    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    import moondream_async as md

    @asynccontextmanager
    async def lifespan(app):
        async with md.MoondreamClient() as app.state.client:  # the key is in MOONDREAM_API_KEY
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/ask")
    async def ask(question: str):
        stream = await app.state.client.query("photo.jpg", question, stream=True)
        events = stream.sse()
        return StreamingResponse(events, headers=events.headers)

    # ---------------------------------------------------------------------------------

    @app.get("/text")
    async def text(question: str):
        stream = await app.state.client.query("photo.jpg", question, stream=True)
        return StreamingResponse(stream.chunk, media_type="text/plain")

    @app.get("/restless")
    async def restless(question: str):
        stream = await app.state.client.query("photo.jpg", question, stream=True)
        return StreamingResponse(stream.sse(heartbeat=0.01))

    return app


def aiohttp():
    from aiohttp import web

    import moondream_async as md

    client_key = web.AppKey("client", md.MoondreamClient)

    async def client(app):
        async with md.MoondreamClient() as app[client_key]:  # the key is in MOONDREAM_API_KEY
            yield

    async def ask(request):
        question = request.query["question"]
        stream = await request.app[client_key].query("photo.jpg", question, stream=True)
        events = stream.sse()
        return web.Response(body=events, headers=events.headers)

    app = web.Application()
    app.cleanup_ctx.append(client)
    app.router.add_get("/ask", ask)
    if __name__ == "__main__":  # without the option, it sees a browser go at its next write only
        web.run_app(app, handler_cancellation=True)

    # ---------------------------------------------------------------------------------

    async def text(request):
        question = request.query["question"]
        async with request.app[client_key].query("photo.jpg", question, stream=True) as stream:
            response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
            await response.prepare(request)
            async for chunk in stream.chunk:
                await response.write(chunk.encode())
        return response

    async def restless(request):
        question = request.query["question"]
        stream = await request.app[client_key].query("photo.jpg", question, stream=True)
        return web.Response(body=stream.sse(heartbeat=0.01))

    app.router.add_get("/text", text)
    app.router.add_get("/restless", restless)
    return app


def litestar():
    from litestar import Litestar, Request, get
    from litestar.response import Stream

    import moondream_async as md

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with md.MoondreamClient() as app.state.client:
            yield

    async def query(request):
        question = request.query_params["question"]
        return await request.app.state.client.query("photo.jpg", question, stream=True)

    @get("/ask")
    async def ask(request: Request) -> Stream:
        events = (await query(request)).sse()
        return Stream(events, headers=events.headers)

    @get("/text")
    async def text(request: Request) -> Stream:
        return Stream((await query(request)).chunk, media_type="text/plain")

    @get("/restless")
    async def restless(request: Request) -> Stream:
        return Stream((await query(request)).sse(heartbeat=0.01))

    return Litestar([ask, text, restless], lifespan=[lifespan])


def quart():
    from quart import Quart, Response, request

    import moondream_async as md

    app = Quart(__name__)

    @app.while_serving
    async def lifespan():
        async with md.MoondreamClient() as app.client:
            yield

    async def query():
        return await app.client.query("photo.jpg", request.args["question"], stream=True)

    @app.get("/ask")
    async def ask():
        events = (await query()).sse()
        response = Response(events, headers=events.headers)
        response.timeout = None  # Quart's own ends an answer after a minute, as if it were whole
        return response

    @app.get("/text")
    async def text():
        return Response((await query()).chunk, mimetype="text/plain")

    @app.get("/restless")
    async def restless():
        return Response((await query()).sse(heartbeat=0.01))

    return app


def django():
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import StreamingHttpResponse
    from django.urls import path

    import moondream_async as md

    class Urls:
        client = None

    async def query(request):
        return await Urls.client.query("photo.jpg", request.GET["question"], stream=True)

    async def ask(request):
        events = (await query(request)).sse()
        return StreamingHttpResponse(events, headers=events.headers)

    async def text(request):
        return StreamingHttpResponse((await query(request)).chunk, content_type="text/plain")

    async def restless(request):
        return StreamingHttpResponse((await query(request)).sse(heartbeat=0.01))

    Urls.urlpatterns = [path("ask", ask), path("text", text), path("restless", restless)]
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["127.0.0.1"], LOGGING_CONFIG=None)
    settings.ROOT_URLCONF = Urls
    http = get_asgi_application()

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await http(scope, receive, send)
            return
        await receive()  # Django leaves its start and its end to others
        async with md.MoondreamClient() as Urls.client:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return app


# -- servers ------------------------------------------------------------------------------


def bound():
    """Return a socket at a free port, whose connections hold little on the way."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    sock.bind(("127.0.0.1", 0))
    return sock


def listening():
    sock = bound()
    sock.listen(128)
    return sock


def origin(sock):
    return f"http://127.0.0.1:{sock.getsockname()[1]}"


@contextlib.asynccontextmanager
async def uvicorn(app):
    from uvicorn import Config, Server

    server = Server(Config(app, lifespan="on", log_config=None))
    with listening() as sock:
        serving = asyncio.ensure_future(server.serve([sock]))
        while not server.started:
            assert not serving.done(), serving.result()
            await asyncio.sleep(0)
        try:
            yield origin(sock)
        finally:
            server.should_exit = True
            await serving


@contextlib.asynccontextmanager
async def hypercorn(app):
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    sock = listening()
    config = Config()
    config.bind = [f"fd://{sock.fileno()}"]
    config.errorlog = None
    stop = asyncio.Event()
    serving = asyncio.ensure_future(serve(app, config, shutdown_trigger=stop.wait))
    try:
        yield origin(sock)
    finally:
        stop.set()
        await serving
        sock.detach()


@contextlib.asynccontextmanager
async def own(app, **options):
    from aiohttp import web

    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, **options)
    await runner.setup()
    sock = listening()
    await web.SockSite(runner, sock).start()
    try:
        yield origin(sock)
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def cancelling(app):
    """aiohttp's, told to cancel who answers a browser that has gone."""
    async with own(app, handler_cancellation=True) as address:
        yield address


BACKENDS = {
    "fastapi-uvicorn": (fastapi, uvicorn),
    "fastapi-hypercorn": (fastapi, hypercorn),
    "aiohttp": (aiohttp, cancelling),
    "litestar-uvicorn": (litestar, uvicorn),
    "quart-hypercorn": (quart, hypercorn),
    "django-uvicorn": (django, uvicorn),
    "django-hypercorn": (django, hypercorn),
}


@contextlib.asynccontextmanager
async def running(backend, server):
    """Run a backend while it is entered; skip the test where its framework is not there."""
    for name in {backend.__name__, server.__name__} - {"own", "cancelling"}:
        pytest.importorskip(name, reason=NEEDS)
    async with server(backend()) as address:
        yield address
