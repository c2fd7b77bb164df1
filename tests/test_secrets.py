"""The API key is seen by the endpoint, and by nobody else.

Whatever a server says or does, the key is in no message, repr, argument, traceback, log
record or warning, and in nothing that can be reached from an exception: no local variable
of a frame, no attribute and no item, at any depth.
"""

import asyncio
import functools
import gzip
import inspect
import io
import logging
import pickle
import traceback

import aiohttp
import pytest
from canned import IMAGE
from raw_server import (
    ANSWER,
    CHUNKED,
    DONE,
    EVENT_STREAM,
    EVENTS,
    STREAM_HEAD,
    RawServer,
    answer_all,
    head,
    in_chunks,
    tls,
    whole,
)
from reachable import is_of_tests, where_in
from rich.console import Console
from rich.traceback import Traceback

import moondream_async as md
from moondream_async.integrations import datasets
from moondream_async.integrations.ray import Secret as RaySecret
from moondream_async.integrations.ray import SkillStage
from moondream_async.integrations.ray import ask as ray_ask

# Tests see the key by this name only: a local variable would be found in their own frames.
KEY = "sk-shown-to-nobody-0123456789"
ESCAPED = KEY.replace("s", "\\u0073").encode()
BIG_IMAGE = md.EncodedImage(b"\xff\xd8" + bytes(5_000_000), "image/jpeg", 8, 8)


def client_of(server, **options):
    return md.MoondreamClient(
        KEY, endpoint=server.endpoint, **({"max_retries": 0, "timeout": SHORT} | options)
    )


SHORT = md.Timeout(pool=0.1, connect=5, first_event=0.3, idle=0.3)


def everything_about(error):
    """All text that a program could print of an exception."""
    seen = [pickle.dumps(error).decode("latin-1")]
    while error is not None:
        frames = traceback.TracebackException.from_exception(error, capture_locals=True)
        seen += [repr(error), str(error), repr(error.args), repr(vars(error)), *frames.format()]
        error = error.__cause__ or error.__context__
    return "\n".join(seen)


@pytest.fixture(autouse=True)
def spoken(caplog, recwarn):
    """All that is logged or warned of; it is looked through at the end."""
    for name in (None, "aiohttp", "asyncio", "moondream_async"):
        caplog.set_level(logging.DEBUG, name)
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger().addHandler(handler)
    yield logged
    logging.getLogger().removeHandler(handler)
    assert not [line for line in logged.getvalue().splitlines() if KEY in line]
    assert not [each for each in recwarn if KEY in str(each.message)]


async def call(client, skill, *, stream, image=IMAGE):
    """Call, and read to the end."""
    if skill == "chat":
        answer = await client.chat([{"role": "user", "content": "?"}], stream=stream)
    else:
        answer = await client.caption(image, stream=stream)
    return await answer.text() if stream else answer


async def assert_hidden(
    client, skill="caption", *, stream=False, image=IMAGE, error=md.MoondreamError
):
    with pytest.raises(error) as caught:
        await call(client, skill, stream=stream, image=image)
    assert not [line for line in everything_about(caught.value).splitlines() if KEY in line]
    assert where_in(caught.value, KEY) == []
    assert KEY not in repr(client)
    return caught.value


def playing(*data, then=None):
    async def play(peer):
        await peer.request()
        await peer.send(*data)
        if then is not None:
            await then(peer)

    return play


def saying(template, **options):
    """Answer with what quotes the key, plainly or escaped."""
    return playing(whole(template.replace(b"KEY", KEY.encode()), **options))


def streaming(*events):
    quoted = [each.replace(b"KEY", KEY.encode()) for each in events]
    return playing(STREAM_HEAD + in_chunks(*quoted))


async def stall(peer):
    await peer.until_gone()


async def echo(peer):
    """Send back the request itself."""
    await peer.send(b"%b\r\nX-Moondream-Auth: %b\r\n\r\n" % (b"POST / HTTP/1.1", KEY.encode()))


async def reset(peer):
    peer.reset()


QUOTED = b"The key KEY is wrong"
ANSWERS = {
    "401": saying(b'{"error": {"message": "Bad KEY", "code": "KEY"}}', status="401 Unauthorized"),
    "401-string": saying(b'{"error": "Bearer KEY"}', status="401 Unauthorized"),
    "401-escaped": saying(
        b'{"error": "%b", "%b": ["%b"]}' % (ESCAPED, ESCAPED, ESCAPED), status="401 Unauthorized"
    ),
    "401-text": saying(QUOTED, status="401 Unauthorized", kind="text/plain"),
    "401-html": saying(b"<p>" + QUOTED, status="401 Unauthorized", kind="text/html"),
    "401-reason": saying(b"{}", status=f"401 {KEY}"),
    "401-header": playing(whole(b"{}", f"WWW-Authenticate: {KEY}", status="401 Unauthorized")),
    "401-gzip": playing(
        whole(gzip.compress(KEY.encode()), "Content-Encoding: gzip", status="401 Unauthorized")
    ),
    "401-cut": playing(head("Content-Length: 99", status="401 Unauthorized"), KEY.encode()),
    "500-detail": saying(b'{"error": "x", "detail": "KEY"}', status="500 Oh"),
    "422-list": saying(b'{"detail": [{"loc": ["KEY"], "msg": "KEY"}]}', status="422 Oh"),
    "200-error": saying(b'{"error": "Bad KEY", "status": "error"}'),
    "200-escaped": saying(b'{"error": "%b", "x": "%b"}' % (ESCAPED, ESCAPED)),
    "200-no-answer": saying(b'{"KEY": "KEY"}'),
    "200-no-json": saying(b"KEY"),
    "200-no-object": saying(b'["KEY"]'),
    "200-html": saying(b"<p>" + QUOTED, kind="text/html"),
    "200-kind": saying(b"x", kind=f"text/{KEY}"),
    "200-cut": playing(head("Content-Length: 99", "Content-Type: application/json"), KEY.encode()),
    "redirect": playing(whole(b"", f"Location: http://127.0.0.1:1/{KEY}", status="307 There")),
    "redirect-nowhere": playing(whole(b"", f"Location: http://[{KEY}", status="307 There")),
    "redirect-303": playing(whole(b"", f"Location: /{KEY}", status="303 There")),
    "bad-status": playing(f"HTTP/1.1 {KEY} {KEY}\r\n\r\n".encode()),
    "bad-version": playing(f"{KEY}\r\n\r\n".encode()),
    "bad-header": playing(f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n".encode()),
    "bad-header-value": playing(f"HTTP/1.1 200 OK\r\nX: {KEY}\x00\r\n\r\n".encode()),
    "bad-length": playing(f"HTTP/1.1 200 OK\r\nContent-Length: {KEY}\r\n\r\n".encode()),
    "bad-chunk": playing(STREAM_HEAD, f"{KEY}\r\n".encode()),
    "bad-encoding": playing(head(EVENT_STREAM, CHUNKED, f"Content-Encoding: {KEY}"), b"0\r\n\r\n"),
    "long-header": playing(f"HTTP/1.1 200 OK\r\nX: {KEY * 1000}\r\n\r\n".encode()),
    "echo": playing(then=echo),
    "closed": playing(),
    "reset": playing(then=reset),
    "silent": playing(then=stall),
    "silent-after-the-key": playing(STREAM_HEAD + f"5\r\n{KEY}".encode(), then=stall),
    # Where events were asked for:
    "error": streaming(b'data: {"error": {"message": "Bad KEY", "code": "KEY"}}\n\n'),
    "error-escaped": streaming(b'data: {"error": "%b", "%b": "%b"}\n\n' % ((ESCAPED,) * 3)),
    "error-later": streaming(EVENTS[0], b'data: {"error": "Bad KEY"}\n\n'),
    "named-error": streaming(b"event: error\ndata: Bad KEY\n\n"),
    "no-json": streaming(b"data: KEY\n\n"),
    "no-object": streaming(b'data: ["KEY"]\n\n'),
    "no-text": streaming(b'data: {"chunk": ["KEY"]}\n\n'),
    "no-text-escaped": streaming(b'data: {"chunk": ["%b"]}\n\n' % ESCAPED),
    "half": streaming(b'data: {"error": "Bad KEY'),
    "cut": playing(STREAM_HEAD + in_chunks(b'data: {"error": "' + KEY.encode(), end=False)),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_key_is_in_nothing_of_an_error(name):
    async with RawServer(ANSWERS[name]) as server, client_of(server) as client:
        await assert_hidden(client, "caption")
        await assert_hidden(client, "caption", stream=True)
        if not name.startswith("no-text"):  # to a chat, events of an unknown kind
            await assert_hidden(client, "chat", stream=True)
            assert KEY in server.requests[-1].headers["authorization"]
        assert KEY in server.requests[0].headers["x-moondream-auth"]


async def test_key_is_in_nothing_that_asyncio_says_in_debug_mode(spoken):
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0  # so that every callback is printed
    for name in ("401", "200-no-json", "bad-chunk", "redirect", "reset", "silent-after-the-key"):
        async with RawServer(ANSWERS[name]) as server, client_of(server) as client:
            await assert_hidden(client)
            await assert_hidden(client, "chat", stream=True)
    assert "Executing <" in spoken.getvalue()


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_key_is_not_in_the_frames_of_an_upload_that_breaks(stream):
    async def play(peer):
        await peer.request_head()
        peer.reset()

    async with RawServer(play) as server, client_of(server) as client:
        for image in (IMAGE, BIG_IMAGE) * 2:
            await assert_hidden(client, stream=stream, image=image)


async def test_key_is_not_in_the_frames_of_a_request_on_a_lost_connection():
    """The connection is closed and the server gone, as the next request begins."""
    for _ in range(5):
        async with RawServer(playing(whole(ANSWER))) as server:
            client = client_of(server)
            await client.caption(IMAGE)
        async with client:
            await assert_hidden(client, error=md.APIConnectionError)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_key_is_not_in_what_a_cancelled_call_leaves(stream):
    async with RawServer(playing(then=stall)) as server, client_of(server) as client:
        calling = asyncio.ensure_future(call(client, "caption", stream=stream))
        while not server.requests:
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await calling
        assert KEY not in everything_about(caught.value)


async def test_key_is_in_nothing_of_an_error_without_a_server():
    async with RawServer(stall) as server:
        client = client_of(server)
    async with client:
        error = await assert_hidden(client, error=md.APIConnectionError)
        assert "Could not connect" in str(error)
    await assert_hidden(client, error=md.ClientClosedError)


async def test_key_is_in_nothing_of_a_call_that_finds_no_place():
    async with (
        RawServer(answer_all) as server,
        client_of(server, max_connections=1) as client,
        client.caption(IMAGE, stream=True),
    ):
        await assert_hidden(client, error=md.APITimeoutError)


async def test_key_is_in_nothing_of_a_certificate_that_is_not_trusted():
    async with RawServer(answer_all, ssl_context=tls()[0]) as server, client_of(server) as client:
        await assert_hidden(client, error=md.APIConnectionError)


@pytest.mark.parametrize("code", [407, 502])
async def test_key_is_in_nothing_of_a_proxy_that_refuses(code):
    async with (
        RawServer(playing(whole(KEY.encode(), status=f"{code} {KEY}"))) as proxy,
        md.MoondreamClient(
            KEY, endpoint="https://127.0.0.1:1/v1", proxy=proxy.origin, max_retries=0
        ) as client,
    ):
        await assert_hidden(client, error=md.APIConnectionError)
        (request,) = proxy.requests
        assert KEY not in repr(request)  # it goes through TLS only, which was not reached


async def test_key_is_in_nothing_of_a_session_that_is_closed():
    async with RawServer(answer_all) as server:
        async with aiohttp.ClientSession() as session:
            client = client_of(server, session=session)
        await assert_hidden(client)
        await client.aclose()


def tables(skill, **options):
    """Return a way to begin work on a table: its own arguments, and the client's."""
    return lambda key, **more: skill(None, **{"api_key": key, **options, **more})


def stage(key, **options):
    return SkillStage(api_key=key and RaySecret(key), **options)


async def finetune(key, **options):
    await md.ft(key, **({"finetune_id": "x"} | options))


SECRET_ADDRESSES = [f"{way}://u:{KEY}@{host}" for way in ("http", "x") for host in ("h:a", "[h")]
REFUSED_OPTIONS = [
    {"no_such": 1},
    {},
    *({"endpoint": each} for each in (*SECRET_ADDRESSES, f"http://u:{KEY}@127.0.0.1:1")),
    *({"proxy": each} for each in SECRET_ADDRESSES),
    *(
        {"proxy": each}
        for each in (f"u:{KEY}@h:3128", f"http://u:{KEY}@:3128", f"http://{KEY}@h:0")
    ),
    {"timeout": "7"},
    {"max_retries": -1},
]
MAKERS = {
    "client": md.MoondreamClient,
    "vl": md.vl,
    "ft": finetune,
    "ft-bare": functools.partial(finetune, finetune_id=None),
    "datasets": tables(datasets.ask),
    "datasets-processes": tables(datasets.ask, num_proc="x"),
    "ray": tables(ray_ask),
    "ray-actors": tables(ray_ask, actors=-1),
    "stage": stage,
    "stage-skill": functools.partial(stage, skill="x"),
}


async def ended(made):
    return await made if inspect.isawaitable(made) else made


@pytest.mark.parametrize("maker", MAKERS)
async def test_secret_is_nowhere_below_what_refuses_an_argument(maker, monkeypatch):
    monkeypatch.setenv("MOONDREAM_API_KEY", KEY)
    for options in REFUSED_OPTIONS if maker in ("client", "ft", "ray") else REFUSED_OPTIONS[::3]:
        key = None if KEY in repr(options) else KEY
        with pytest.raises((md.RequestError, TypeError)) as caught:
            await ended(MAKERS[maker](key, **({"endpoint": "no"} | options)))
        assert where_in(caught.value, KEY) == []
    assert KEY not in as_rich_shows(caught)


def as_rich_shows(caught):
    """Return a traceback with the values of local variables, without the tests' own frames."""
    frames = caught.tb
    while frames is not None and is_of_tests(frames.tb_frame):
        frames = frames.tb_next
    shown = io.StringIO()
    Console(file=shown, width=300).print(
        Traceback.from_exception(caught.type, caught.value, frames, extra_lines=0, show_locals=True)
    )
    return shown.getvalue()


async def ask_row(key, photo, **options):
    with datasets.asking(api_key=key, **options) as ask:
        return await ask({"image": str(photo)})


@pytest.mark.parametrize("act", [ask_row, lambda key, _, **options: finetune(key, **options)])
async def test_key_that_is_refused_is_nowhere_below_the_error(act, photo):
    refusal = whole(b'{"error": "Bad %b"}' % KEY.encode(), status="401 Unauthorized")
    async with RawServer(playing(refusal)) as server:
        with pytest.raises(md.AuthenticationError) as caught:
            await act(KEY, photo, endpoint=server.endpoint, max_retries=0)
    assert where_in(caught.value, KEY) == []


@pytest.mark.parametrize("make", [md.MoondreamClient, md.vl])
async def test_key_that_cannot_be_right_is_not_shown(make):
    for spoil in (f"{KEY}\n{KEY}".__str__, [KEY].copy, KEY.encode):
        with pytest.raises(md.RequestError) as caught:
            make(spoil())
        assert KEY not in everything_about(caught.value)


async def test_key_is_in_nothing_that_hooks_are_told():
    told = []
    hooks = md.Hooks(request=told.append, retry=told.append, end=told.append)
    refusal = playing(whole(KEY.encode(), "Retry-After: 0", status="503 Busy"))
    async with (
        RawServer(refusal) as server,
        client_of(server, hooks=hooks, max_retries=1) as client,
    ):
        await assert_hidden(client)
    assert len(told) == 4
    assert KEY not in repr(told)


SAYS = f"X-Request-Id: r-7\r\nX-Said: {KEY}"
WITH_HEADERS = [
    whole(b"{}", SAYS, status="401 Unauthorized"),
    whole(b'{"error": "no"}', SAYS),
    whole(b'{"error": "no"}', SAYS, kind="text/event-stream"),
    whole(b'{"x": 1}', SAYS),
    whole(b"[", SAYS),
    whole(b"", SAYS, "Location: http://127.0.0.1:1/", status="307 There"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_error_of_a_response_has_its_headers_without_the_key(stream):
    for answer in WITH_HEADERS:
        async with RawServer(playing(answer)) as server, client_of(server) as client:
            error = await assert_hidden(client, stream=stream, error=md.APIStatusError)
        for each in (error, pickle.loads(pickle.dumps(error))):
            assert each.headers["x-request-id"] == each.headers["X-REQUEST-ID"] == "r-7"
            assert each.headers["x-said"] == "***"
            assert not type(each.headers).__module__.startswith("aiohttp")


async def test_stream_and_its_result_have_the_headers_of_the_response():
    for answer in (
        head(EVENT_STREAM, CHUNKED, "X-Said: so") + in_chunks(*EVENTS, DONE),
        whole(ANSWER, "X-Said: so"),
        whole(ANSWER, "X-Said: so", kind="text/event-stream"),
    ):
        async with RawServer(playing(answer)) as server, client_of(server) as client:
            stream = await client.caption(IMAGE, stream=True)
            assert stream.headers["x-said"] == "so"
            result = await stream.result()
            assert pickle.loads(pickle.dumps(result)).headers["x-SAID"] == "so"


# -- where it goes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "stream"), [("127.0.0.1", False), ("localhost", True)], ids=["port", "host"]
)
async def test_another_port_or_host_is_not_even_called(host, stream):
    async with RawServer(answer_all, name=host) as other:
        for code in (303, 307):
            moved = whole(b"", f"Location: {other.endpoint}/caption", status=f"{code} There")
            async with RawServer(playing(moved)) as server, client_of(server) as client:
                error = await assert_hidden(client, stream=stream, error=md.APIStatusError)
                assert error.status == code
                assert other.origin in str(error)
                assert len(server.requests) == 1
        assert other.peers == []


async def test_key_goes_in_one_header_and_nowhere_else():
    async with RawServer(answer_all) as server, client_of(server) as client:
        await client.caption(IMAGE)
        stream = await client.query(IMAGE, "?", stream=True)
        slots = [name for each in type(stream).__mro__ for name in getattr(each, "__slots__", ())]
        assert KEY not in repr([vars(client), *(getattr(stream, name) for name in slots)])
        for request in server.requests:
            holding = [name for name, value in request.headers.items() if KEY in value]
            assert holding == ["x-moondream-auth"]
            assert KEY.encode() not in request.body
            assert KEY not in request.target
        await client.aclose()
