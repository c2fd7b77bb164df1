"""The demo page's server, spoken to as browsers and others would: over sockets of loopback."""

import asyncio
import errno
import io
import json
import socket
from contextlib import asynccontextmanager, closing
from types import SimpleNamespace

import aiohttp
import pytest
from programs import running
from spoken import speak

import moondream_async as md
from moondream_async.simulator import Simulator
from moondream_async.web import DemoPage
from moondream_async.web.server import MAX_BODY_BYTES, STATIC

KEY = "the-key-of-the-user"
FILES = sorted(f"/static/{path.name}" for path in STATIC.iterdir())
PATHS = ["/", "/about", "/picture", *FILES]

QUESTIONS = {
    "caption": {"skill": "caption", "length": "short"},
    "query": {"skill": "query", "question": "How many shapes?", "reasoning": False},
    "detect": {"skill": "detect", "object": "red circle"},
    "point": {"skill": "point", "object": "red circle", "settings": {"max_objects": 1}},
    "segment": {"skill": "segment", "object": "red circle"},
    "chat": {"skill": "chat", "messages": [{"role": "user", "content": "Which colours?"}]},
}


@pytest.fixture
async def page(client, photo):
    async with DemoPage(client, photo, simulated=True, port=0) as page:
        yield page


async def visit(page, path, method="GET", headers=None, **options):
    """Send what the page's own requests have, or other headers in place of that."""
    origin = page.url.rstrip("/")
    headers = {"Origin": origin} if headers is None else headers
    return await speak(page, method, origin + path, headers=headers, **options)


@pytest.fixture
def ask(page, photo):
    """Asks as the page does, about the sample unless another picture is given."""

    async def ask(question, picture=None, **options):
        picture = photo.read_bytes() if picture is None else picture
        question = QUESTIONS.get(question, question) if isinstance(question, str) else question
        return await visit(page, "/ask", "POST", data=body(question, picture), **options)

    return ask


def body(question, picture=b""):
    """What the page posts; a question that is no JSON may be given as bytes."""
    line = question if isinstance(question, bytes) else json.dumps(question).encode()
    return io.BytesIO(line + b"\n" + picture)


def events(answer):
    """The events of an answer, as names and data."""
    blocks = [
        block.split("\n") for block in answer.data.decode().split("\n\n") if block[:7] == "event: "
    ]
    return [(name.removeprefix("event: "), json.loads(data[6:])) for name, data in blocks]


# -- the files ----------------------------------------------------------------------------


KINDS = {"html": "text/html", "css": "text/css", "svg": "image/svg+xml"}


async def test_everything_comes_with_a_policy_that_lets_in_nothing_else(page):
    for path in PATHS:
        answer = await visit(page, path)
        assert answer.status == 200, path
        policy = answer.headers["Content-Security-Policy"]
        policy = dict(each.split(" ", 1) for each in policy.split("; "))
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert not {"*", "http:", "https:", "'unsafe-inline'", "'unsafe-eval'"} & set(
            " ".join(policy.values()).split()
        )
        if path in FILES:  # is what its name says
            kind = answer.headers["Content-Type"].partition(";")[0]
            kind = kind.replace("application/", "text/")  # as Python's version has it
            assert kind == KINDS.get(path.rpartition(".")[2], "text/javascript"), path


async def test_nothing_else_is_served(page, client, photo):
    for path in ("/static/../server.py", "/static/%2e%2e/server.py", "/ask", "/x"):
        answer = await visit(page, path)
        assert answer.status in (403, 404, 405), path
        assert answer.message
    about = (await visit(page, "/about")).json
    assert (about["endpoint"], about["simulated"]) == (client.endpoint, True)
    answer = await visit(page, "/picture")
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert answer.data == photo.read_bytes()


async def test_a_page_listens_on_its_port_or_where_it_may(client, photo, page):
    async with DemoPage(client, photo) as one, DemoPage(client, photo) as another:
        assert one.url != another.url
    with pytest.raises(OSError) as caught:
        async with DemoPage(client, photo, port=int(port_of(page))):
            pass
    assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(RuntimeError, match="isn't served"):
        _ = DemoPage(client, photo).url
    with pytest.raises(md.ImageError):
        async with DemoPage(client, b"no picture", port=0):
            pass


# -- who may ask --------------------------------------------------------------------------


def port_of(page):
    return page.url.split(":")[2].strip("/")


OURS = ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"]
OTHERS = ["rebound.example:{port}", "127.0.0.1.rebound.example:{port}", "rebound.example"]
OTHERS += ["127.0.0.1:1", "localhost", "127.0.0.2:{port}", "0.0.0.0:{port}", ""]


async def test_only_names_of_this_machine_are_answered(page):
    for path in ("/", "/about", "/picture"):
        for host in OURS + OTHERS:
            headers = {"Host": host.format(port=port_of(page)), "Origin": page.url.rstrip("/")}
            answer = await visit(page, path, headers=headers)
            assert answer.status == (200 if host in OURS else 421), host
            assert host in OURS or "answers only as 127.0.0.1" in answer.message


STRANGERS = [
    None,
    "null",
    "http://evil.example",
    "http://127.0.0.1:1",
    "http://127.0.0.1",
    "https://127.0.0.1:{port}",
    "http://localhost:{port}",  # the page's, but not of the name that it was asked by
    "http://127.0.0.1:{port}.evil.example",
    "http://127.0.0.1:{port}, http://evil.example",
]


async def test_questions_of_other_origins_are_refused_and_not_asked(page, ask, simulator):
    for origin in STRANGERS:
        headers = {"Origin": origin.format(port=port_of(page))} if origin else {}
        answer = await ask("caption", headers=headers)
        assert answer.status == 403, origin
        assert "Origin" in answer.message
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert simulator.requests == []


LINKS = [  # a request, its site and mode, and the answer's status
    ("POST /ask", "cross-site", "cors", 403),
    ("POST /ask", "same-site", "cors", 403),
    ("POST /ask", "cross-site", "navigate", 403),
    ("POST /ask", "same-origin", "cors", 200),
    ("GET /about", "cross-site", "no-cors", 403),
    ("GET /about", "same-site", "cors", 403),
    ("GET /", "cross-site", "navigate", 200),
    ("GET /", "none", "navigate", 200),
    ("OPTIONS /ask", "same-origin", "cors", 405),
]


async def test_other_pages_may_link_to_it_and_no_more(page, photo):
    for request_line, site, mode, status in LINKS:
        method, path = request_line.split()
        data = body(QUESTIONS["caption"], photo.read_bytes()) if method == "POST" else None
        headers = {"Origin": page.url.rstrip("/"), "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
        answer = await visit(page, path, method, headers, data=data)
        assert answer.status == status, (request_line, site, mode)


@pytest.mark.parametrize("key", [KEY, "a-wrong-key-of-the-user"])
async def test_the_key_is_in_nothing_that_is_served(key, photo):
    async with (
        Simulator(api_key=KEY) as simulator,
        md.MoondreamClient(key, endpoint=simulator.endpoint) as client,
        DemoPage(client, photo, port=0) as page,
    ):
        picture = photo.read_bytes()
        asked = [("/ask", "POST", body(each, picture)) for each in QUESTIONS.values()]
        for path, method, data in [(path, "GET", None) for path in PATHS] + asked:
            answer = await visit(page, path, method, data=data)
            assert answer.status == (401 if data and key != KEY else 200)
            assert key not in str(answer)
            assert KEY not in str(answer)


# -- answers ------------------------------------------------------------------------------


async def test_texts_come_in_chunks_and_then_what_is_known_of_them(ask, client, photo):
    message = {"role": "user", "content": ["Which colours?", photo]}
    for skill, expected in (
        ("caption", (await client.caption(photo, length="short")).caption),
        ("query", (await client.query(photo, "How many shapes?")).answer),
        ("chat", (await client.chat([message])).message.content),
    ):
        answer = await ask(skill)
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        *chunks, (last, about) = events(answer)
        assert "".join(data["chunk"] for _, data in chunks) == expected
        assert {name for name, _ in chunks} == {"chunk"}
        assert last == "done"
        assert about["request_id"]


async def test_places_come_whole_and_an_outline_with_its_place_first(ask, client, photo):
    for skill, key in (("detect", "objects"), ("point", "points")):
        found = await getattr(client, skill)(photo, "red circle")
        assert (await ask(skill)).json[key] == [dict(each) for each in found[key]]
    first, *_, (last, about) = events(await ask("segment"))
    found = await client.segment(photo, "red circle")
    assert first == ("bbox", {"bbox": dict(found.bbox)})
    assert (last, about["path"]) == ("done", found.path)


# -- what goes wrong ----------------------------------------------------------------------


async def is_refused(asking, simulator, status, said):
    answer = await asking
    assert (answer.status, said in answer.data.decode()) == (status, True), answer
    assert answer.message
    assert simulator.requests == []


ODD = [
    (b"", "could not be read"),
    (b"{", "could not be read"),
    (b"[]", "could not be read"),
    (b'{"skill": "query", "question": "\xff"}', "could not be read"),
    ({"skill": "dance"}, "could not be read"),
    ({"skill": "caption", "api_key": "x"}, "could not be read"),
    ({"skill": "chat", "messages": [{"role": "system", "content": "x"}]}, "could not be read"),
    ({"skill": "caption", "settings": {"max_tokens": 0}}, "max_tokens"),
    ({"skill": "query"}, "question"),
    ({"skill": "detect", "object": " "}, "object"),
    ({"skill": "chat"}, "messages"),
]


async def test_questions_that_cannot_be_right_are_refused_with_a_sentence(ask, simulator):
    for question, sentence in ODD:
        await is_refused(ask(question), simulator, 400, sentence)
    await is_refused(ask("caption", b"no picture"), simulator, 400, "ImageError")
    await is_refused(ask("caption", bytes(MAX_BODY_BYTES)), simulator, 413, "32 MB")


async def test_a_refusal_of_the_server_comes_with_its_status(ask, simulator, photo, nobody):
    for skill in QUESTIONS:
        simulator.faults.append("status=403")
        answer = await ask(skill)
        assert (answer.status, answer.json["error"]["type"]) == (403, "PermissionDeniedError")
        assert answer.message, skill
    async with (
        md.MoondreamClient(endpoint=nobody, max_retries=0) as client,
        DemoPage(client, photo, port=0) as page,
    ):
        question = body(QUESTIONS["caption"], photo.read_bytes())
        answer = await visit(page, "/ask", "POST", data=question)
    assert (answer.status, answer.json["error"]["type"]) == (502, "APIConnectionError")


# -- readers who go away ------------------------------------------------------------------


async def test_who_goes_away_ends_the_call(page, simulator, photo):
    origin = page.url.rstrip("/")
    async with aiohttp.ClientSession(origin, headers={"Origin": origin}) as browser:
        for skill in ("caption", "query", "segment", "chat"):  # in the middle
            simulator.faults.append("stall=3")
            question = body(QUESTIONS[skill], photo.read_bytes())
            async with browser.post("/ask", data=question) as response:
                await response.content.readuntil(b"\n\n")
                assert not simulator.requests[-1].ended.is_set()
                response.close()
            await simulator.requests[-1].ended.wait()
            assert simulator.requests[-1].disconnected
        for skill in ("query", "detect"):  # while the model thinks
            simulator.faults.append("slow_start=1000")
            asked = len(simulator.requests)
            question = body(QUESTIONS[skill], photo.read_bytes())
            asking = asyncio.ensure_future(browser.post("/ask", data=question))
            await simulator.wait_until(lambda asked=asked: len(simulator.requests) > asked)
            asking.cancel()
            await simulator.requests[-1].ended.wait()
            assert simulator.requests[-1].disconnected


async def test_leaving_the_page_ends_answers_on_their_way(simulator, client, photo):
    simulator.faults.append("stall=3")
    async with aiohttp.ClientSession() as browser:
        async with DemoPage(client, photo, port=0) as page:
            headers = {"Origin": page.url.rstrip("/")}
            question = body(QUESTIONS["caption"], photo.read_bytes())
            response = await browser.post(f"{page.url}ask", data=question, headers=headers)
            await response.content.readuntil(b"\n\n")
        await simulator.requests[0].ended.wait()
        assert simulator.requests[0].disconnected
        response.close()


# -- the command --------------------------------------------------------------------------


@asynccontextmanager
async def demo(*args, **environment):
    """Run ``demo --web``; yields the program and the page's address."""
    command = ("moondream-async", "demo", "--web", "--port", "0", *args)
    async with running(*command, **environment) as program:
        await program.until("\n")
        yield program, program.said.strip()


@pytest.mark.slow
async def test_demo_serves_the_page_until_ctrl_c(interruptible, photo):
    async with demo("--rate", "0") as (program, url):
        at = SimpleNamespace(url=url)
        assert (await visit(at, "/")).status == 200
        question = body(QUESTIONS["caption"], photo.read_bytes())
        assert events(await visit(at, "/ask", "POST", data=question))[-1][0] == "done"
        program.interrupt()
        status, _, errors = await program.end()
    assert status == 130
    assert "No model is looking" in str(errors)
    assert "Traceback" not in str(errors)


@pytest.mark.slow
async def test_demo_serves_the_picture_and_the_server_that_it_is_given(simulator, tmp_path, photo):
    picture = tmp_path / "grey.ppm"
    picture.write_bytes(b"P6 2 1 255 " + bytes(6))
    async with demo(picture, MOONDREAM_ENDPOINT=simulator.endpoint) as (_, url):
        at = SimpleNamespace(url=url)
        about = (await visit(at, "/about")).json
        kind = (await visit(at, "/picture")).headers["Content-Type"]
    assert kind in ("image/png", "image/jpeg")
    assert about["endpoint"] == simulator.endpoint
    assert about["simulated"] is False
    assert about["picture"] == str(picture)


@pytest.mark.parametrize(
    ("args", "status", "reason"),
    [
        (["demo", "--port", "1"], 2, "no effect without '--web'"),
        (["demo", "--web", "--port", "{taken}"], 1, "Can't listen on port {taken}"),
        (["demo", "--web", "no-such-picture.jpg"], 1, "does not exist"),
    ],
    ids=str,
)
def test_demo_says_in_one_line_why_there_is_no_page(args, status, reason, capsys):
    from moondream_async.cli import main

    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        taken = other.getsockname()[1]
        assert main([arg.format(taken=taken) for arg in args]) == status
    output, errors = capsys.readouterr()
    assert output == ""
    assert reason.format(taken=taken) in errors
    assert errors.count("\n") == 1
