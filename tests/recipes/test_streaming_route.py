"""A FastAPI route that streams, and its tests: from a copy of this, users' own can start.

It is served over a real socket. The in-memory transports of httpx and Starlette hand a
response over when it is whole: they would not show that it streams, and would wait for
ever for one that is held in the middle.
"""

import contextlib
import socket
import threading

import pytest

import moondream_async as md

INSTALL = "python -m pip install '.[foreign]'"
fastapi = pytest.importorskip("fastapi", reason=f"needs: {INSTALL}")
httpx = pytest.importorskip("httpx", reason=f"needs: {INSTALL}")
uvicorn = pytest.importorskip("uvicorn", reason=f"needs: {INSTALL}")


# -- the application -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def lifespan(app):
    async with md.MoondreamClient() as app.state.moondream:
        yield


app = fastapi.FastAPI(lifespan=lifespan)


@app.post("/describe")
async def describe(request: fastapi.Request):
    picture = await request.body()
    try:
        stream = await request.app.state.moondream.caption(picture, stream=True)
    except md.ImageError as error:
        raise fastapi.HTTPException(415, str(error)) from error
    return fastapi.responses.StreamingResponse(stream.chunk, media_type="text/plain")


# -- its tests -----------------------------------------------------------------------------


@pytest.fixture
def http(moondream_simulator):
    """A client of the application; what that calls in turn is the simulator."""
    listening = socket.create_server(("127.0.0.1", 0))
    host, port = listening.getsockname()
    server = uvicorn.Server(uvicorn.Config(app, ws="none", log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    with httpx.Client(base_url=f"http://{host}:{port}", trust_env=False) as client:
        yield client
    server.should_exit = True
    thread.join()
    listening.close()


def test_text_is_passed_on_while_it_is_written(http, moondream_simulator, photo):
    answer = moondream_simulator.script.caption(["A red", " circle."], hold_after=1)
    with http.stream("POST", "/describe", content=photo.read_bytes()) as response:
        pieces = response.iter_text()
        assert next(pieces) == "A red"  # and the rest is yet to be written
        answer.release()
        assert "".join(pieces) == " circle."


def test_reader_who_leaves_frees_the_server(http, moondream_simulator, photo):
    moondream_simulator.script.caption(["A red", " circle."], hold_after=1)
    with http.stream("POST", "/describe", content=photo.read_bytes()) as response:
        assert next(response.iter_text()) == "A red"
    moondream_simulator.wait_until(lambda: moondream_simulator.requests[0].disconnected)


def test_short_outage_is_not_noticed(http, moondream_simulator, photo):
    moondream_simulator.faults.append("status=503,retry_after=0")
    moondream_simulator.script.caption("A red circle.")
    assert http.post("/describe", content=photo.read_bytes()).text == "A red circle."


def test_stream_that_breaks_is_no_whole_text(http, moondream_simulator, photo):
    moondream_simulator.script.caption(["A red", " circle."], fault="drop=1")
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/describe", content=photo.read_bytes())


def test_what_is_no_picture_is_refused_before_anybody_is_asked(http, moondream_simulator):
    assert http.post("/describe", content=b"no picture").status_code == 415
    assert moondream_simulator.requests == []
