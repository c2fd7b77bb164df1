"""What a caller of the client sees when all goes well, and when the arguments are wrong."""

import asyncio
import copy
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


@pytest.fixture(params=DIALECTS)
async def any_simulator(request):
    async with Simulator(request.param) as simulator:
        yield simulator


@pytest.fixture
async def any_client(any_simulator):
    async with md.MoondreamClient(endpoint=any_simulator.endpoint) as client:
        yield client


# -- calls ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "result", "kind"),
    [("caption", md.CaptionResult, md.CaptionStream), ("answer", md.QueryResult, md.QueryStream)],
)
async def test_the_text_is_the_same_streamed_and_not(any_client, photo, key, result, kind):
    ask = any_client.caption if key == "caption" else partial(any_client.query, question=QUESTION)
    plain = await ask(photo)
    stream = await ask(photo, stream=True)
    assert isinstance(plain, result)
    assert isinstance(stream, kind)
    pieces = [piece async for piece in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == getattr(plain, key) == plain[key] == plain.raw[key]
    assert stream.completed
    assert stream.text_so_far == plain[key]


async def test_request_id_and_metrics_are_those_of_the_server(any_simulator, any_client, photo):
    plain = await any_client.caption(photo)
    async with any_client.caption(photo, stream=True) as stream:
        await stream.text()
    named = any_simulator.dialect.name in ("cloud", "kestrel")
    assert (plain.request_id is not None) is named
    assert (stream.request_id is not None) is named
    assert (plain.metrics is not None) is (any_simulator.dialect.name != "old")
    assert stream.ttft > 0


async def test_events_without_blank_lines_are_read_one_by_one(photo):
    async with (
        Simulator(blank_lines=False) as simulator,
        md.MoondreamClient(endpoint=simulator.endpoint) as client,
    ):
        plain = await client.caption(photo)
        stream = await client.caption(photo, stream=True)
        assert await stream.text() == plain.caption


async def test_stream_may_be_asked_for_by_a_variable(client, photo):
    for stream in (True, False):
        answer = await client.query(photo, QUESTION, stream=stream)
        assert isinstance(answer, md.QueryStream if stream else md.QueryResult)
        if stream:
            await answer.text()


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


def as_file(photo):
    return io.BytesIO(photo.read_bytes())


@pytest.mark.parametrize(
    "form",
    [str, lambda path: path, lambda path: path.read_bytes(), as_file],
    ids=["text", "path", "bytes", "file"],
)
async def test_picture_is_the_same_to_the_server_in_whichever_form(client, photo, form):
    assert (await client.caption(form(photo))).caption == (await client.caption(photo)).caption


async def test_picture_prepared_once_serves_many_calls(simulator, client, photo):
    image = await client.encode_image(photo)
    assert (image.media_type, image.width, image.height) == ("image/jpeg", 640, 480)
    await client.caption(image)
    await client.query(image, QUESTION)
    await client.caption(photo)
    assert len({request.body["image_url"] for request in simulator.requests}) == 1


async def test_picture_drawn_in_memory_arrives_as_it_is(client):
    red = Image.new("RGB", (32, 32), "red")
    assert "red" in (await client.query(red, "What colour is it?")).answer


# -- connections ----------------------------------------------------------------------


async def test_a_hundred_calls_in_a_row_use_one_connection(simulator, client, photo):
    image = await client.encode_image(photo)
    for _ in range(50):
        await client.caption(image)
        stream = await client.caption(image, stream=True)
        await stream.text()
    assert len(simulator.requests) == 100
    assert simulator.connections.accepted == 1


async def test_error_answers_keep_the_connection(simulator, client, photo):
    simulator.faults.extend(["status=400", "status=401", "status=404"])
    for _ in range(3):
        with pytest.raises(md.APIStatusError):
            await client.caption(photo)
    await client.caption(photo)
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
        assert not session.closed
        async with session.get(simulator.origin) as response:
            assert response.status == 404
    assert [request.headers["X-Mine"] for request in simulator.requests] == ["yes"] * 3
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


async def test_first_call_imports_nothing():
    async with RawServer(answer) as server:
        script = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", textwrap.dedent(FIRST_CALL), server.endpoint),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await script.communicate()
    assert said.decode().split() == []


# -- the client itself ----------------------------------------------------------------


async def test_endpoint_may_end_in_slashes(simulator, photo):
    async with md.MoondreamClient(endpoint=f"{simulator.endpoint}//") as client:
        await client.caption(photo)
    assert simulator.requests[0].path == "/v1/caption"
    assert client.endpoint == simulator.endpoint


async def test_key_and_endpoint_come_from_the_environment(simulator, photo, monkeypatch):
    monkeypatch.setenv("MOONDREAM_API_KEY", "from-the-environment")
    monkeypatch.setenv("MOONDREAM_ENDPOINT", f"{simulator.endpoint}/")
    async with md.MoondreamClient() as client:
        await client.caption(photo)
    async with md.vl(api_key="from-the-call") as client:
        await client.caption(photo)
    sent = [request.headers["X-Moondream-Auth"] for request in simulator.requests]
    assert sent == ["from-the-environment", "from-the-call"]


async def test_local_server_needs_no_key(simulator, photo, monkeypatch):
    monkeypatch.setenv("MOONDREAM_API_KEY", "")
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        await client.caption(photo)
    assert "X-Moondream-Auth" not in simulator.requests[0].headers


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


async def test_closed_client_refuses_calls(simulator, photo):
    client = md.MoondreamClient(endpoint=simulator.endpoint)
    await client.aclose()
    await client.aclose()
    for call in (client.caption(photo), client.query(photo, QUESTION), client.encode_image(photo)):
        with pytest.raises(md.ClientClosedError):
            await call
    with pytest.raises(md.ClientClosedError):
        await client.caption(photo, stream=True)
    with pytest.raises(md.ClientClosedError):
        async with client:
            pass
    assert simulator.requests == []


OPTIONS = [
    {"api_key": "two\nlines"},
    {"api_key": "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"},
    {"api_key": 7},
    {"endpoint": "api.moondream.ai/v1"},
    {"endpoint": "ftp://127.0.0.1/v1"},
    {"endpoint": "http://"},
    {"endpoint": "http://user:word@127.0.0.1/v1"},
    {"endpoint": "http://127.0.0.1/v1?key=x"},
    {"endpoint": "http://[::1/v1"},
    {"endpoint": "http://127.0.0.1:seven/v1"},
    {"timeout": True},
    {"timeout": 0},
    {"timeout": None},
    {"timeout": float("inf")},
    {"max_retries": -1},
    {"max_retries": True},
    {"max_connections": 0},
    {"max_connections": 1.5},
    {"rate_limit": 0},
    {"rate_limit": -2},
    {"rate_limit": float("nan")},
    {"rate_limit": "fast"},
    {"rate_limit": float("inf")},
    {"rate_limit": True},
    {"max_pixels": 0},
    {"max_pixels": 1e6},
    {"model": ""},
    {"model": 5},
    {"endpoint": 5},
    {"endpoint": b"http://127.0.0.1/v1"},
    {"endpoint": URL("ftp://127.0.0.1/v1")},
    {"endpoint": "http://127.0.0.1:0/v1"},
    {"endpoint": f"http://{'x' * 64}.local/v1"},
    {"endpoint": "http://xn--example/v1"},
    {"endpoint": "http://127.0.0.1/v1?"},
    {"proxy": "proxy:3128"},
    {"proxy": "socks5://proxy:1080"},
    {"proxy": "http://[::1"},
    {"proxy": "http://proxy:0"},
    {"proxy": "http://"},
    {"proxy": 3128},
    {"proxy": True},
    {"proxy": b"http://proxy:3128"},
    {"endpoint": 2020},
    {"endpoint": b"http://127.0.0.1:2020/v1"},
    {"api_key": "key", "insecure_hosts": 5},
    {"api_key": "key", "insecure_hosts": [None]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=repr)
def test_option_that_cannot_be_right_is_refused(options):
    with pytest.raises(md.RequestError) as caught:
        md.MoondreamClient(**({"endpoint": "http://127.0.0.1:2020/v1"} | options))
    assert "" in options.values() or not str(caught.value).endswith("not ''")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", ["client", "bulk", "watch"])
async def test_what_holds_connections_or_tasks_can_not_be_copied(client, photo, kind, copied):
    one = {"client": client, "bulk": client.bulk([photo]), "watch": client.watch([photo])}[kind]
    with pytest.raises(TypeError, match="can't be copied"):
        copied(one)


class Waiting:
    async def __call__(self, event):
        pass


@pytest.mark.parametrize(
    "hook",
    [5, "x", Waiting(), partial(Waiting().__call__)],
    ids=["number", "text", "object", "partial"],
)
@pytest.mark.parametrize("name", ["request", "first_chunk", "retry", "end"])
def test_a_hook_that_would_not_be_called_or_awaited_is_refused(name, hook):
    with pytest.raises(md.RequestError, match=rf"Hooks\.{name} must be an ordinary function"):
        md.Hooks(**{name: hook})


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


@pytest.mark.parametrize(
    "headers",
    [{"Accept": "x"}, {"x-moondream-auth": "x"}, {"X": "a\r\nY: b"}, {"a b": "c"}, {"X": 5}, 5],
    ids=repr,
)
def test_headers_that_cannot_be_sent_are_refused(headers):
    with pytest.raises(md.RequestError, match="headers"):
        md.MoondreamClient(None, "http://127.0.0.1:2020/v1", headers=headers)


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


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NOT_TAKEN)
async def test_values_of_a_wrong_kind_are_refused(simulator, client, name, value):
    if (name, value) == ("metrics", -1):
        return

    async def call():
        if inspect.isawaitable(made := NOT_TAKEN[name](client, value)):
            await made

    with pytest.raises(md.RequestError, match=name):
        await call()
    assert simulator.requests == []


def test_photon_says_what_it_would_need():
    with pytest.raises(md.RequestError, match="needs the official package"):
        md.photon("key", model="moondream3")
