"""Which way requests go: through a proxy that was named, one of the environment, or directly."""

import base64
import contextlib

import aiohttp.resolver
import pytest
from canned import IMAGE
from raw_server import ANSWER, TEXT, RawServer, answer, answer_all, head, tls, whole
from yarl import URL

import moondream_async as md
from moondream_async._transport.proxies import proxies_of_environment

PASSWORD = "pw-shown-to-nobody"
HOST = "moondream.example"


def encoded(password):
    return base64.b64encode(f"user:{password}".encode()).decode()


def proxy_with(password=None):
    """A forward proxy on loopback, which answers in the name of every host."""

    async def play(peer):
        request = await peer.request()
        if password and encoded(password) not in request.headers.get("proxy-authorization", ""):
            await peer.send(whole(b"", status="407 No"))
        elif request.method == "CONNECT":
            await peer.send(head(status="200 Connected"))
            await peer.start_tls(tls(HOST)[0])
            await answer(peer)
        else:
            await peer.send(whole(ANSWER))

    return RawServer(play)


def client_of(scheme, key=None, **options):
    return md.MoondreamClient(
        key,
        f"{scheme}://{HOST}/v1",
        ssl_context=tls(HOST)[1],
        max_retries=0,
        insecure_hosts=HOST,
        **options,
    )


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("scheme", "password", "source"),
    [
        ("http", None, "argument"),
        ("http", PASSWORD, "environment"),
        ("https", None, "environment"),
        ("https", PASSWORD, "argument"),
    ],
)
async def test_requests_go_through_the_proxy(scheme, password, source, monkeypatch):
    async with proxy_with(password) as proxy:
        address = proxy.origin.replace("://", f"://user:{password}@") if password else proxy.origin
        if source == "environment":
            monkeypatch.setenv(f"{scheme}_proxy".upper(), address)
        options = {"proxy": address} if source == "argument" else {}
        async with client_of(scheme, "the-key-of-mine", **options) as client:
            assert (await client.caption(IMAGE)).caption == TEXT
        first, last = proxy.requests[0], proxy.requests[-1]
        to = {"https": ("CONNECT", f"{HOST}:443"), "http": ("POST", f"http://{HOST}/v1/caption")}
        assert (first.method, first.target) == to[scheme]
        assert last.headers["x-moondream-auth"] == "the-key-of-mine"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_wrong_password_is_an_error_that_does_not_show_it(scheme):
    async with proxy_with("another") as proxy:
        wrong = proxy.origin.replace("://", f"://user:{PASSWORD}@")
        async with client_of(scheme, proxy=wrong) as client:
            with pytest.raises(md.MoondreamError) as caught:
                await client.caption(IMAGE)
            assert PASSWORD not in repr(client)
    error = caught.value
    if scheme == "http":
        assert error.status == 407
    else:
        assert isinstance(error, md.APIConnectionError)
        assert "proxy" in str(error)
    while error is not None:
        shown = f"{error} {error!r} {vars(error)!r}"
        assert PASSWORD not in shown
        assert encoded(PASSWORD) not in shown
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("way", ["NO_PROXY", "proxy=False"])
async def test_some_are_reached_directly(way, monkeypatch):
    async with proxy_with() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.origin)
        if way == "NO_PROXY":
            monkeypatch.setenv("NO_PROXY", f"other.example, .{HOST}")
        options = {"proxy": False} if way == "proxy=False" else {}
        async with client_of("http", **options) as client:
            with pytest.raises(md.APIConnectionError):  # there is no such host
                await client.caption(IMAGE)
    assert proxy.requests == []


async def test_loopback_is_reached_directly_unless_a_proxy_is_named(monkeypatch):
    async with proxy_with() as proxy, RawServer(answer_all) as server:
        monkeypatch.setenv("ALL_PROXY", proxy.origin)
        for options in ({}, {"proxy": proxy.origin}):
            async with md.MoondreamClient(None, server.endpoint, **options) as client:
                await client.caption(IMAGE)
        assert (len(server.requests), len(proxy.requests)) == (1, 1)


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
    proxies = proxies_of_environment({**given, "ALL_PROXY": "proxy:3"})
    assert proxies.for_url(URL("http://example.com")).url.port == 3


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
