"""What is no request: the simulator and the page answer it, or hang up, and write no traceback."""

import asyncio

import pytest

import moondream_async as md
from moondream_async.simulator import DIALECTS, Simulator
from moondream_async.web import DemoPage

HEAD = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
JSON = HEAD + "Content-Type: application/json\r\n"


def with_body(body, head=JSON):
    return (head + f"Content-Length: {len(body)}\r\n\r\n").encode() + body


REQUESTS = {
    "no-http": b"\x16\x03\x01\x02 hello\r\n\r\n",
    "no-path": b"GET\r\n\r\n",
    "long-header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "chunk": (JSON + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n").encode(),
    "length": (JSON + "Content-Length: ab\r\n\r\n{}").encode(),
    "host": b"GET / HTTP/1.1\r\nHost: \xff\xfe[\r\n\r\n",
    "host-open": b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "path": b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "path-utf8": b"GET /%ff%zz?a=%ff HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n",
    "cut": (JSON + "Content-Length: 100\r\n\r\n{").encode(),
    "no-json": with_body(b"so what"),
    "utf8": with_body(b'"\xff"'),
    "charset": with_body(b"{}", HEAD + "Content-Type: application/json; charset=nope\r\n"),
    "form": with_body(b"--x", HEAD + "Content-Type: multipart/form-data; boundary=\r\n"),
    "form-charset": with_body(b"a=1", HEAD + "Content-Type: text/plain; charset=nope\r\n"),
    "gzip": with_body(b"{}", JSON + "Content-Encoding: gzip\r\n"),
    "deep": with_body(b"[" * 100_000),
    "deep-settings": with_body(
        b'{"skill": "caption", "settings": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}"
    ),
    "expect": with_body(b"{}", JSON + "Expect: nope\r\n"),
}


async def exchange(raw, port, path, *, cut=False):
    for name, value in (("{port}", str(port)), ("{path}", path)):
        raw = raw.replace(name.encode(), value.encode())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        if cut:
            writer.write_eof()  # and no more comes
        return await reader.read(10_000)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("where", ["page", *DIALECTS])
async def test_what_is_no_request_is_no_traceback(where, caplog, photo):
    async with (
        Simulator(where if where in DIALECTS else "cloud") as simulator,
        md.MoondreamClient(endpoint=simulator.endpoint) as client,
        DemoPage(client, photo, port=0) as page,
    ):
        address, path = (page.url, "/ask") if where == "page" else (simulator.origin, "/v1/caption")
        port = int(address.split(":")[2].strip("/"))
        for name, request in REQUESTS.items():
            answer = await exchange(request, port, path, cut=name == "cut")
            assert answer == b"" or answer.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), name
            assert b"Traceback" not in answer, name
            assert [each for each in caplog.records if each.levelname != "DEBUG"] == [], name
            # And whoever comes next is answered.
            good = await exchange(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n", port, path)
            assert good.startswith(b"HTTP/1.1 "), name
