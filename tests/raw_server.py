"""A server of bare sockets that plays what it is told, byte for byte.

It shares nothing with the client nor with the simulator: requests are taken apart
and answers put together by hand, so that it can do what no HTTP library would. A
test says what to play as a coroutine that is run for each connection::

    async def play(peer):
        await peer.request()
        await peer.send(head("Content-Type: text/event-stream"), event("A cat"))
        peer.reset()

    async with RawServer(play) as server:
        client = MoondreamClient(endpoint=server.endpoint)

When it returns, the connection is closed; when the client goes away meanwhile, it
ends quietly at its next `request` or `send`. Whatever else it raises, leaving the
server raises again.
"""

import asyncio
import contextlib
import functools
import json
import socket
import ssl
import struct
from typing import NamedTuple

MAX_HEAD_BYTES = 64 * 1024


class GoneError(Exception):
    """The client has gone away."""


class Request(NamedTuple):
    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def wants_stream(self):
        return self.json["stream"]


class Peer:
    """A connection as the server sees it.

    Attributes:
        requests: What came over it so far.
        bytes_sent: How many bytes the kernel was given.
    """

    def __init__(self, reader, writer):
        self.requests = []
        self.bytes_sent = 0
        self._reader = reader
        self._writer = writer

    async def request(self):
        """Take a whole request."""
        method, target, headers = await self.request_head()
        body = await self._read(self._reader.readexactly(int(headers.get("content-length", 0))))
        request = Request(method, target, headers, body)
        self.requests.append(request)
        return request

    async def request_head(self):
        """Take a request up to the empty line, and leave its body on the way."""
        raw = await self._read(self._reader.readuntil(b"\r\n\r\n"))
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        return method, target, {name.lower(): value.strip() for name, _, value in pairs}

    async def next_byte(self):
        """Wait until the next request has begun to arrive; GoneError if none will."""
        return await self._read(self._reader.readexactly(1))

    async def send(self, *data):
        """Send it all, and wait while the kernel takes no more."""
        for each in data:
            if self._writer.is_closing():
                raise GoneError
            self._writer.write(each)
            try:
                await self._writer.drain()
            except ConnectionError:
                raise GoneError from None
            self.bytes_sent += len(each)

    async def start_tls(self, ssl_context):
        await self._writer.start_tls(ssl_context)

    def reset(self):
        """Break the connection off: the client gets RST in place of an orderly end."""
        # Lingering for zero seconds makes the kernel do so.
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def close(self):
        """End the connection in good order."""
        self._writer.close()

    async def until_gone(self):
        """Wait until the client has closed the connection; what still comes is dropped."""
        with contextlib.suppress(GoneError):
            while await self._read(self._reader.read(MAX_HEAD_BYTES)):
                pass

    async def _read(self, reading):
        try:
            return await reading
        except (asyncio.IncompleteReadError, ConnectionError):
            raise GoneError from None


class RawServer:
    """Listens on a free port of loopback while it is entered.

    Attributes:
        endpoint: For a client.
        peers: All connections there were, the oldest first.
    """

    def __init__(self, play, *, ssl_context=None, host="127.0.0.1", name=None, sock=None):
        self.peers = []
        self._play = play
        self._ssl_context = ssl_context
        self._where = {"host": host, "port": 0} if sock is None else {"sock": sock}
        self._name = name or host
        self._playing = {}
        self._failures = []
        self._ended = asyncio.Event()

    @property
    def port(self):
        return self._server.sockets[0].getsockname()[1]

    @property
    def origin(self):
        return f"http{'s' if self._ssl_context else ''}://{self._name}:{self.port}"

    @property
    def endpoint(self):
        return f"{self.origin}/v1"

    @property
    def requests(self):
        return [request for peer in self.peers for request in peer.requests]

    @property
    def open(self):
        """How many connections are still being played on."""
        return len(self._playing)

    @property
    def tasks(self):
        """What plays on them."""
        return self._playing.keys()

    async def until_idle(self):
        """Wait until all connections have ended."""
        while self._playing:
            self._ended.clear()
            await self._ended.wait()

    async def __aenter__(self):
        self._server = await asyncio.start_server(
            self._accept, **self._where, ssl=self._ssl_context, limit=MAX_HEAD_BYTES, backlog=1024
        )
        return self

    async def __aexit__(self, exc_type, *_):
        self._server.close()
        for task in self._playing:
            task.cancel()
        for task, writer in tuple(self._playing.items()):
            writer.transport.abort()
            await asyncio.wait([task])
        await self._server.wait_closed()
        if self._failures and exc_type is None:
            raise self._failures[0]

    def _accept(self, reader, writer):
        self.peers.append(Peer(reader, writer))
        task = asyncio.ensure_future(self._run(self.peers[-1], writer))
        self._playing[task] = writer
        task.add_done_callback(self._end)

    async def _run(self, peer, writer):
        try:
            await self._play(peer)
        except (GoneError, asyncio.CancelledError):
            pass
        except Exception as error:  # noqa: BLE001 - raised again in the test's own task
            self._failures.append(error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    def _end(self, task):
        del self._playing[task]
        self._ended.set()


@functools.cache
def tls(host="127.0.0.1", until=None):
    """Return the context of a server at this host, and that of a client that trusts it."""
    import trustme

    authority = trustme.CA()
    served, trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert(host, not_after=until).configure_cert(served)
    authority.configure_trust(trusted)
    return served, trusted


# -- what answers are made of ---------------------------------------------------------


def head(*headers, status="200 OK", version="HTTP/1.1"):
    """Return the head of an answer."""
    return "\r\n".join([f"{version} {status}", *headers, "", ""]).encode("latin-1")


def in_chunks(*pieces, end=True):
    """Return a chunked body, each piece as a chunk of its own."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n" * end


def event(chunk=None, **fields):
    """Return an event as the servers write it."""
    said = {} if chunk is None else {"chunk": chunk}
    return f"data: {json.dumps(said | fields)}\n\n".encode()


def whole(body, *headers, status="200 OK", kind="application/json"):
    """Return a plain answer of known length."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    kinds = [f"Content-Type: {kind}"] if kind else []
    return head(f"Content-Length: {len(body)}", *kinds, *headers, status=status) + body


EVENT_STREAM = "Content-Type: text/event-stream; charset=utf-8"
CHUNKED = "Transfer-Encoding: chunked"
DONE = event(completed=True, request_id="r-1")
WORDS = ("A ", "cat ", "sleeps.")
EVENTS = tuple(event(word) for word in WORDS)
TEXT = "".join(WORDS)
STREAM_HEAD = head(EVENT_STREAM, CHUNKED)
STREAM = STREAM_HEAD + in_chunks(*EVENTS, DONE)
ANSWER = {"caption": TEXT, "answer": TEXT, "request_id": "r-1"}


async def answer(peer):
    """Answer a request as it should be; return it."""
    request = await peer.request()
    await peer.send(STREAM if request.wants_stream else whole(ANSWER))
    return request


async def answer_all(peer):
    """Answer every request on a connection."""
    while True:
        await answer(peer)


async def listen(peer):
    """Take a request and say nothing."""
    await peer.request()
    await peer.until_gone()


async def stall(peer):
    """Take a request, say a word and then nothing."""
    await peer.request()
    await peer.send(STREAM_HEAD + in_chunks(EVENTS[0], end=False))
    await peer.until_gone()
