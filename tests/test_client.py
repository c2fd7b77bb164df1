"""What a caller of the client sees when all goes well, and when the arguments are wrong."""

import asyncio
import copy
import gc
import inspect
import io
import pickle
import re
import sys
import textwrap
from functools import partial

import aiohttp
import pytest
from PIL import Image
from raw_server import RawServer, answer
from yarl import URL

import moondream_async as md
from moondream_async.simulator import DIALECTS, Simulator

QUESTION = "What is in this image?"


# -- calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_the_text_is_the_same_streamed_and_not(client, photo, dialect):
    for key, ask, result, kind in (
        ("caption", client.caption, md.CaptionResult, md.CaptionStream),
        ("answer", partial(client.query, question=QUESTION), md.QueryResult, md.QueryStream),
    ):
        plain = await ask(photo)
        stream = await ask(photo, stream=True)
        assert isinstance(plain, result)
        assert isinstance(stream, kind)
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert "".join(pieces) == getattr(plain, key) == plain[key] == plain.raw[key]
        assert stream.completed
        assert stream.text_so_far == plain[key]
        assert stream.ttft > 0
        named = dialect in ("cloud", "kestrel")
        assert (plain.request_id is not None) is (stream.request_id is not None) is named
        assert (plain.metrics is not None) is (dialect != "old")


async def test_model_of_the_client_is_that_of_calls_that_name_none(simulator, photo):
    async with md.MoondreamClient(endpoint=simulator.endpoint, model="of-the-client") as client:
        await client.caption(photo)
        await client.caption(photo, model="of-the-call")
    assert [each.body["model"] for each in simulator.requests] == ["of-the-client", "of-the-call"]


async def test_headers_are_what_the_servers_want(simulator, photo):
    async with md.MoondreamClient("a-key", endpoint=simulator.endpoint) as client:
        await client.caption(photo)
        await (await client.caption(photo, stream=True)).text()
    plain, streamed = (request.headers for request in simulator.requests)
    assert plain["Accept"] == "application/json"
    assert streamed["Accept"] == "text/event-stream"
    for headers in (plain, streamed):
        assert headers["X-Moondream-Auth"] == "a-key"
        assert headers["Content-Type"] == "application/json"  # the old server takes nothing else
        assert headers["Accept-Encoding"] == "identity"
        assert headers["User-Agent"].startswith("moondream-async/")
        assert int(headers["Content-Length"]) > 0
        assert "Transfer-Encoding" not in headers


async def test_picture_is_prepared_once_and_the_same_in_whichever_form(simulator, client, photo):
    image = await client.encode_image(photo)
    assert (image.media_type, image.width, image.height) == ("image/jpeg", 640, 480)
    data = photo.read_bytes()
    for form in (image, image, photo, str(photo), data, io.BytesIO(data)):
        await client.caption(form)
    assert len({request.body["image_url"] for request in simulator.requests}) == 1
    red = Image.new("RGB", (32, 32), "red")
    assert "red" in (await client.query(red, "What colour is it?")).answer


# -- connections ----------------------------------------------------------------------


async def test_calls_in_a_row_use_one_connection_refused_ones_too(simulator, client, photo):
    image = await client.encode_image(photo)
    for _ in range(10):
        await client.caption(image)
        stream = await client.caption(image, stream=True)
        await stream.text()
    simulator.faults.extend(["status=400", "status=401", "status=404"])
    for _ in range(3):
        with pytest.raises(md.APIStatusError):
            await client.caption(photo)
    await client.caption(photo)
    assert len(simulator.requests) == 24
    assert simulator.connections.accepted == 1


async def test_calls_at_once_are_bounded_by_max_connections(simulator, photo):
    async with md.MoondreamClient(endpoint=simulator.endpoint, max_connections=3) as client:
        image = await client.encode_image(photo)
        await asyncio.gather(*[client.caption(image) for _ in range(30)])
    assert len(simulator.requests) == 30
    assert simulator.connections.accepted <= 3


async def test_session_of_the_caller_is_used_and_not_closed(simulator, photo):
    async with aiohttp.ClientSession(headers={"X-Mine": "yes"}) as session:
        async with md.MoondreamClient(endpoint=simulator.endpoint, session=session) as client:
            await client.caption(photo)
            await (await client.caption(photo, stream=True)).text()
        client = md.MoondreamClient(endpoint=simulator.endpoint, session=session)
        await client.caption(photo)
        del client  # it has nothing of its own to close
        gc.collect()
        await asyncio.sleep(0)
        assert not session.closed
        async with session.get(simulator.origin) as response:
            assert response.status == 404
    assert [request.headers["X-Mine"] for request in simulator.requests] == ["yes"] * 4
    assert simulator.connections.accepted == 1


@pytest.mark.parametrize(
    "options",
    [
        {"raise_for_status": True},
        {"timeout": aiohttp.ClientTimeout(total=1e-9)},
        {"auto_decompress": False},
        {"read_bufsize": 1},
        {"base_url": "http://elsewhere.invalid/"},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_session_of_the_caller_may_have_its_own_ways(simulator, photo, options):
    async with (
        aiohttp.ClientSession(**options) as session,
        md.MoondreamClient(endpoint=simulator.endpoint, session=session, max_retries=0) as client,
    ):
        plain = await client.caption(photo)
        stream = await client.caption(photo, stream=True)
        assert await stream.text() == plain.caption
        simulator.faults.append("status=401")
        with pytest.raises(md.AuthenticationError, match="Simulated error 401"):
            await client.caption(photo)


FIRST_CALL = """
    import asyncio, sys
    import moondream_async as md

    async def main():
        client = md.MoondreamClient(endpoint=sys.argv[1])
        loaded = set(sys.modules)
        async with client.caption(md.EncodedImage(b"jpeg", "image/jpeg", 8, 8), stream=True) as it:
            await it.text()
        await client.aclose()
        print(*sorted(set(sys.modules) - loaded))

    asyncio.run(main())
"""


@pytest.mark.slow
async def test_first_call_imports_nothing():
    async with RawServer(answer) as server:
        script = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", textwrap.dedent(FIRST_CALL), server.endpoint),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await script.communicate()
    assert said.decode().split() == []


# -- the client itself ----------------------------------------------------------------


async def test_key_and_endpoint_come_from_the_environment(simulator, photo, monkeypatch):
    monkeypatch.setenv("MOONDREAM_API_KEY", "from-the-environment")
    monkeypatch.setenv("MOONDREAM_ENDPOINT", f"{simulator.endpoint}//")
    async with md.MoondreamClient() as client:
        await client.caption(photo)
    assert client.endpoint == simulator.endpoint
    async with md.vl(api_key="from-the-call") as client:
        await client.caption(photo)
    monkeypatch.setenv("MOONDREAM_API_KEY", "")
    async with md.MoondreamClient() as client:  # a local server needs none
        await client.caption(photo)
    sent = [request.headers.get("X-Moondream-Auth") for request in simulator.requests]
    assert sent == ["from-the-environment", "from-the-call", None]
    assert simulator.requests[0].path == "/v1/caption"


@pytest.mark.parametrize("endpoint", [None, "https://api.moondream.ai/v1/"], ids=["none", "named"])
def test_cloud_without_a_key_is_refused_with_the_ways_out(endpoint):
    with pytest.raises(md.RequestError) as caught:
        md.MoondreamClient(endpoint=endpoint)
    for way in ("api_key=", "MOONDREAM_API_KEY", "endpoint=", "moondream-async demo"):
        assert way in str(caught.value)


async def test_repr_shows_the_state_and_not_the_key(simulator, photo):
    client = md.MoondreamClient("sk-secret", endpoint=simulator.endpoint)
    assert repr(client) == f"<MoondreamClient {simulator.endpoint}, 0 open>"
    async with client:
        stream = await client.caption(photo, stream=True)
        assert repr(client) == f"<MoondreamClient {simulator.endpoint}, 1 open>"
        assert re.fullmatch(r"<CaptionStream open, 0 characters, request None>", repr(stream))
        await stream.text()
        assert repr(client) == f"<MoondreamClient {simulator.endpoint}, 0 open>"
        assert "complete" in repr(stream)
    assert repr(client) == f"<MoondreamClient {simulator.endpoint}, closed>"


CALLS = {
    "caption": lambda client, photo: client.caption(photo),
    "caption, streamed": lambda client, photo: client.caption(photo, stream=True),
    "query": lambda client, photo: client.query(photo, QUESTION),
    "detect": lambda client, photo: client.detect(photo, "circle"),
    "point": lambda client, photo: client.point(photo, "circle"),
    "segment": lambda client, photo: client.segment(photo, "circle"),
    "chat": lambda client, photo: client.chat([{"role": "user", "content": [photo, QUESTION]}]),
    "models": lambda client, photo: client.models(),
    "health": lambda client, photo: client.health(),
    "encode_image": lambda client, photo: client.encode_image(photo),
    "enter": lambda client, photo: client.__aenter__(),
}


async def test_closed_client_refuses_every_call(simulator, photo):
    client = md.MoondreamClient(endpoint=simulator.endpoint)
    await client.aclose()
    await client.aclose()
    for call in CALLS.values():
        with pytest.raises(md.ClientClosedError):
            await call(client, photo)
    assert simulator.requests == []


async def test_key_goes_out_in_the_header_of_the_endpoint_and_a_wrong_one_is_not_shown(photo):
    async with (
        Simulator(api_key="a-key") as simulator,
        md.MoondreamClient("a-key", endpoint=simulator.endpoint) as client,
        md.MoondreamClient("sk-wrong", endpoint=simulator.endpoint) as wrong,
    ):
        for name in ("caption", "query", "detect", "point", "segment", "chat", "models"):
            await CALLS[name](client, photo)
            headers = simulator.requests[-1].headers
            bearer = name in ("chat", "models")  # docs/openai.md of the API's documentation
            assert headers.get("Authorization") == ("Bearer a-key" if bearer else None)
            assert headers.get("X-Moondream-Auth") == (None if bearer else "a-key")
            with pytest.raises(md.AuthenticationError, match="Invalid API key") as caught:
                await CALLS[name](wrong, photo)
            assert "sk-wrong" not in repr(caught.value)
        assert len(simulator.requests) == 2 * 7
        await CALLS["health"](client, photo)
        assert simulator.requests[-1].headers["X-Moondream-Auth"] == "a-key"


def refused(make, given):
    """Return what is not refused of what is given, and what is said of the rest."""
    taken, said = [], []
    for options in given:
        try:
            make(**options)
            taken.append(options)
        except md.RequestError as error:
            said.append(str(error))
    return taken, said


WRONG_OPTIONS = {
    "api_key": ["two\nlines", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", 7],
    "endpoint": [
        *("api.moondream.ai/v1", "ftp://127.0.0.1/v1", "http://", "http://user:word@127.0.0.1/v1"),
        *("http://127.0.0.1/v1?key=x", "http://127.0.0.1/v1?", "http://[::1/v1", 5, 2020),
        *("http://127.0.0.1:seven/v1", "http://127.0.0.1:0/v1", "http://xn--example/v1"),
        *(b"http://127.0.0.1:2020/v1", URL("ftp://127.0.0.1/v1"), f"http://{'x' * 64}.local/v1"),
    ],
    "proxy": [
        *("proxy:3128", "socks5://proxy:1080", "http://[::1", "http://proxy:0", "http://"),
        *(3128, True, b"http://proxy:3128"),
    ],
    "timeout": [True, 0, None, float("inf")],
    "max_retries": [-1, True],
    "max_connections": [0, 1.5],
    "rate_limit": [0, -2, float("nan"), "fast", float("inf"), True],
    "max_pixels": [0, 1e6],
    "model": ["", 5],
    "insecure_hosts": [5, [None]],
    "headers": [
        *({"Accept": "x"}, {"x-moondream-auth": "x"}, {"X": "a\r\nY: b"}, {"a b": "c"}),
        *({"X": 5}, 5),
    ],
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_option_that_cannot_be_right_is_refused(name):
    right = {"endpoint": "http://127.0.0.1:2020/v1"}
    if name == "insecure_hosts":
        right["api_key"] = "key"
    given = [right | {name: value} for value in WRONG_OPTIONS[name]]
    taken, said = refused(md.MoondreamClient, given)
    assert taken == []
    assert name != "headers" or all(name in each for each in said)
    assert not [each for each in said if each.endswith("not ''") and name != "model"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
async def test_what_holds_connections_or_tasks_can_not_be_copied(client, photo, copied):
    for one in (client, client.bulk([photo]), client.watch([photo])):
        with pytest.raises(TypeError, match="can't be copied"):
            copied(one)


class Waiting:
    async def __call__(self, event):
        pass


@pytest.mark.parametrize("name", ["request", "first_chunk", "retry", "end"])
def test_a_hook_that_would_not_be_called_or_awaited_is_refused(name):
    hooks = (5, "x", Waiting(), partial(Waiting().__call__))
    taken, said = refused(md.Hooks, [{name: hook} for hook in hooks])
    assert taken == []
    assert all(f"Hooks.{name} must be an ordinary function" in each for each in said)


async def test_options_for_other_calls_go_over_the_same_connections(simulator, photo):
    async with md.MoondreamClient(
        "the-key-of-mine", simulator.endpoint, headers={"X-Team": "birds"}
    ) as client:
        other = client.with_options(timeout=9, model="mine", headers={"X-Job": "night"})
        await client.caption(photo)
        await other.caption(photo)
        await other.aclose()
        assert (other.closed, client.closed) == (True, False)
        with pytest.raises(md.ClientClosedError):
            await other.caption(photo)
        await client.caption(photo)
        again = client.with_options(max_retries=0)
    assert client.closed
    assert again.closed
    first, second, _ = simulator.requests
    assert first.headers["X-Team"] == second.headers["X-Team"] == "birds"
    assert second.headers["X-Job"] == "night"
    assert "X-Job" not in first.headers
    assert second.body["model"] == "mine"
    assert simulator.connections.accepted == 1


NO_NUMBERS = [True, "5", float("nan"), float("inf"), -1, b"1", [1]]
NOT_TAKEN = {
    "session": lambda client, value: md.MoondreamClient(None, client.endpoint, session=value),
    "ssl_context": lambda client, value: md.MoondreamClient(
        None, client.endpoint, ssl_context=value
    ),
    "grace": lambda client, value: client.aclose(value),
    "timeout": lambda _, value: md.fetch_image("http://127.0.0.1:1/", timeout=value),
    "max_bytes": lambda _, value: md.fetch_image("http://127.0.0.1:1/", max_bytes=value),
    "max_pixels": lambda _, value: md.fetch_image("http://127.0.0.1:1/", max_pixels=value),
    "line_width": lambda _, value: md.DetectResult(objects=[md.Region(0, 0, 1, 1)]).draw(
        md.SAMPLE_IMAGE, line_width=value
    ),
    "metrics": lambda client, value: client.tuning.log_metrics("f", 1, {"x": value}),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
async def test_values_of_a_wrong_kind_are_refused(simulator, client, name):
    async def call(value):
        if inspect.isawaitable(made := NOT_TAKEN[name](client, value)):
            await made

    for value in NO_NUMBERS:
        if (name, value) != ("metrics", -1):
            with pytest.raises(md.RequestError, match=name):
                await call(value)
    assert simulator.requests == []


def test_photon_says_what_it_would_need():
    with pytest.raises(md.RequestError, match="needs the official package"):
        md.photon("key", model="moondream3")
