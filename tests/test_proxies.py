"""Which way requests go: through a proxy that was named, one of the environment, or directly."""

import asyncio
import base64
import contextlib

import aiohttp.resolver
import pytest
from canned import IMAGE
from raw_server import RawServer, answer_all
from raw_server import tls as contexts
from yarl import URL

import moondream_async as md
from moondream_async._transport.proxies import proxies_of_environment

PASSWORD = "pw-shown-to-nobody"
HOST = "moondream.example"


class ForwardProxy:
    """A forward proxy on loopback: every host is one server, whose address it is given."""

    def __init__(self, server, password=None):
        self.port = int(server.origin.rpartition(":")[2])
        self.seen = []
        self._wanted = password and base64.b64encode(f"user:{password}".encode()).decode()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.host = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info):
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.seen.append(head.decode().split(" HTTP/")[0])
            if self._wanted and f"Basic {self._wanted}".encode() not in head:
                writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
            else:
                await self._pass_on(head, reader, writer)
        writer.close()

    async def _pass_on(self, head, reader, writer):
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        else:
            back.write(head)

        async def copy(source, target):
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    target.write(data)
            target.close()

        await asyncio.gather(copy(reader, back), copy(there, writer))


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.asynccontextmanager
async def behind(*, tls=False, password=None):
    """A server behind a proxy; gives both, its endpoint, and options for its client."""
    served, trusted = contexts(HOST)
    async with (
        RawServer(answer_all, ssl_context=served if tls else None) as server,
        ForwardProxy(server, password) as proxy,
    ):
        scheme = "https" if tls else "http"
        options = {"ssl_context": trusted, "max_retries": 0, "insecure_hosts": HOST}
        yield server, proxy, f"{scheme}://{HOST}:{server.origin.rpartition(':')[2]}/v1", options


@pytest.mark.parametrize(
    ("tls", "password", "source"),
    [
        (False, None, "argument"),
        (False, PASSWORD, "environment"),
        (True, None, "environment"),
        (True, PASSWORD, "argument"),
    ],
)
async def test_requests_go_through_the_proxy(tls, password, source, monkeypatch):
    async with behind(tls=tls, password=password) as (server, proxy, endpoint, options):
        address = f"http://{f'user:{password}@' if password else ''}{proxy.host}"
        if source == "argument":
            options["proxy"] = address
        else:
            monkeypatch.setenv("HTTPS_PROXY" if tls else "HTTP_PROXY", address)
        async with md.MoondreamClient("the-key-of-mine", endpoint, **options) as client:
            await client.caption(IMAGE)
        assert proxy.seen[0].startswith("CONNECT" if tls else f"POST {endpoint}/caption")
        assert server.requests[0].headers["x-moondream-auth"] == "the-key-of-mine"


@pytest.mark.parametrize("tls", [False, True], ids=["http", "CONNECT"])
async def test_a_wrong_password_is_an_error_that_does_not_show_it(tls):
    async with behind(tls=tls, password="another") as (_, proxy, endpoint, options):
        options["proxy"] = f"http://user:{PASSWORD}@{proxy.host}"
        async with md.MoondreamClient(None, endpoint, **options) as client:
            with pytest.raises(md.APIConnectionError if tls else md.APIStatusError) as caught:
                await client.caption(IMAGE)
            assert PASSWORD not in repr(client)
    assert "proxy" in str(caught.value) if tls else caught.value.status == 407
    token = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    error = caught.value
    while error is not None:
        shown = f"{error} {error!r} {vars(error)!r}"
        assert PASSWORD not in shown
        assert token not in shown
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("way", ["loopback", "NO_PROXY", "proxy=False"])
async def test_some_are_reached_directly(way, monkeypatch):
    async with behind() as (server, proxy, endpoint, options):
        monkeypatch.setenv("ALL_PROXY", f"http://{proxy.host}")
        if way == "NO_PROXY":
            monkeypatch.setenv("NO_PROXY", f"other.example, .{HOST}")
        if way == "proxy=False":
            options["proxy"] = False
        target = server.endpoint if way == "loopback" else endpoint
        async with md.MoondreamClient(None, target, **options) as client:
            if way == "loopback":
                await client.caption(IMAGE)
            else:
                with pytest.raises(md.APIConnectionError):  # there is no such host
                    await client.caption(IMAGE)
    assert proxy.seen == []


async def test_a_proxy_that_is_named_is_used_for_loopback_too():
    async with behind() as (server, proxy, _, _options):
        async with md.MoondreamClient(
            None, server.endpoint, proxy=f"http://{proxy.host}"
        ) as client:
            await client.caption(IMAGE)
        assert len(proxy.seen) == 1


NO_PROXY = [
    ("*", "example.com", False),
    ("example.com", "www.example.com", False),
    (".example.com", "example.com", False),
    ("ample.com", "example.com", True),
    ("example.com:8080", "example.com", True),
    ("10.0.0.0/8", "10.1.2.3", False),
    ("10.0.0.0/8", "11.1.2.3", True),
    ("10.1.2.3/8", "10.9.9.9", False),
    ("[fd00::1]", "[fd00::1]", False),
]


def test_no_proxy_names_hosts_and_networks():
    for direct, host, proxied in NO_PROXY:
        proxies = proxies_of_environment({"https_proxy": "proxy:3128", "no_proxy": direct})
        assert (proxies.for_url(URL(f"https://{host}/")) is not None) is proxied, direct


def test_in_a_cgi_script_no_header_of_a_browser_names_the_proxy():
    given = {"HTTP_PROXY": "proxy:1", "HTTPS_PROXY": "proxy:2", "REQUEST_METHOD": "GET"}
    proxies = proxies_of_environment(given)
    assert proxies.for_url(URL("http://example.com")) is None
    assert proxies.for_url(URL("https://example.com")).url.port == 2


def test_a_proxy_of_the_environment_that_is_not_spoken_is_told_when_it_is_needed(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    md.MoondreamClient(None, "http://127.0.0.1:2020/v1")
    with pytest.raises(md.RequestError, match="ALL_PROXY in the environment"):
        md.MoondreamClient("key")


async def test_a_key_goes_over_plain_http_to_no_address_beyond_the_local_network(monkeypatch):
    """A name may look near and resolve to anything."""

    async def resolve(self, host, port=0, family=0):
        return [{"hostname": host, "host": "8.8.8.8", "port": port, "family": 2, "proto": 6,
                 "flags": 0}]  # fmt: skip

    monkeypatch.setattr(aiohttp.resolver.ThreadedResolver, "resolve", resolve)
    with contextlib.suppress(ImportError):
        from moondream_async._transport.resolver import Resolver

        monkeypatch.setattr(Resolver, "resolve", resolve)
    async with md.MoondreamClient("key", "http://station:2020/v1", max_retries=0) as client:
        with pytest.raises(md.APIConnectionError, match=r"leads to 8\.8\.8\.8") as caught:
            await client.caption(IMAGE)
    assert caught.value.permanent


def test_a_key_is_refused_over_plain_http_however_the_host_is_written():
    far = ["example.com", "93.184.216.34", "vision.example.org:8080", "example\u3002com"]
    far += ["\uff18.\uff18.\uff18.\uff18", "134744072"]
    for host in far:
        with pytest.raises(md.RequestError, match="plain http"):
            md.MoondreamClient("key", f"http://{host}/v1")
        md.MoondreamClient(endpoint=f"http://{host}/v1")  # no key, nothing to read
    with pytest.raises(md.RequestError, match="plain http"):
        md.MoondreamClient("key", "http://example.com/v1", insecure_hosts="my.example.com")


def test_a_key_may_go_near_or_over_tls_or_to_hosts_that_are_named():
    near = ["127.0.0.1:2020", "localhost:2020", "[::1]:2020"]
    near += ["192.168.1.7", "moondream:2020", "station.local"]
    for host in near:
        md.MoondreamClient("key", f"http://{host}/v1")
    md.MoondreamClient("key", "https://example.com/v1")
    for named in ("Example.com", ["EXAMPLE.com."], {"example\u3002com"}):
        md.MoondreamClient("key", "http://example.com", insecure_hosts=named)
