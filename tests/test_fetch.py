"""Pictures fetched from the web, and what is refused."""

import re

import pytest
from raw_server import CHUNKED, RawServer, head, in_chunks, whole

import moondream_async as md
from moondream_async._transport.addresses import is_near, is_near_host, is_public, parse, shown

HERE = ["127.0.0.1/32"]


def site(*, host="127.0.0.1", **pages):
    """A web site on loopback, of answers and of what plays them."""

    async def play(peer):
        while True:
            page = pages[(await peer.request()).target.strip("/")]
            await (peer.send(page) if isinstance(page, bytes) else page(peer))

    return RawServer(play, host=host)


PICTURE = whole(md.SAMPLE_IMAGE.read_bytes(), kind="image/jpeg")


def redirect(target):
    return whole(b"", f"Location: {target}", status="302 Found")


async def test_a_picture_is_fetched_and_prepared(client):
    async with site(photo=PICTURE) as web:
        image = await md.fetch_image(f"{web.origin}/photo", allow=HERE)
        (request,) = web.requests
    assert (image.media_type, image.width, image.height) == ("image/jpeg", 640, 480)
    assert "moondream" in request.headers["user-agent"]
    assert "JPEG picture" in (await client.caption(image)).caption


LOOPBACK = [
    "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "[::1]", "0.0.0.0", "[::]", "127.1",
    "2130706433", "0x7f.0.0.1", "0177.0.0.1", "127.0.0.1.", "127.0.0.2",
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "\uff11\uff12\uff17.0.0.1",
    "127\u30020\u30020\u30021", "\uff4c\u24de\uff43alhost", "127.0.0.1\u00ad",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]",
    "[64:ff9b::127.0.0.1]", "[64:ff9b:1::127.0.0.1]", "[2002:7f00:1::]", "[fe80::1%25lo]",
    "[::1%25lo]", "10.0.0.1", "169.254.169.254", "[fec0::1]",
]  # fmt: skip


@pytest.mark.parametrize("host", LOOPBACK, ids=ascii)
async def test_addresses_inside_are_refused_before_anything_is_sent(host):
    async with site(photo=PICTURE) as inside:
        with pytest.raises(md.MoondreamError) as caught:
            await md.fetch_image(f"http://{host}:{inside.port}/photo")
        assert inside.requests == []
    if host != "localhost.":  # which not every system knows
        assert re.search("not on the public internet|no valid address", str(caught.value))


async def test_addresses_inside_are_refused_after_a_redirect():
    async with site(photo=PICTURE) as inside:
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"):
            target = f"http://{host}:{inside.port}/photo"
            async with site(away=redirect(target), host="127.0.0.9") as allowed:
                with pytest.raises(md.MoondreamError, match="not on the public internet"):
                    await md.fetch_image(f"{allowed.origin}/away", allow=["127.0.0.9/32"])
        assert inside.requests == []


async def test_a_redirect_is_followed_and_relative_ones_too():
    async with site(photo=PICTURE, away=redirect("/photo")) as web:
        image = await md.fetch_image(f"{web.origin}/away", allow=HERE[0])  # one, as a string
        assert [request.target for request in web.requests] == ["/away", "/photo"]
    assert image.width == 640


async def test_redirects_in_circles_end():
    async with site(round=redirect("/round")) as web:
        with pytest.raises(md.ImageError, match="redirects more than 5 times"):
            await md.fetch_image(f"{web.origin}/round", allow=HERE)
        assert len(web.requests) == 6


async def test_more_than_max_bytes_is_not_read(photo):
    async def endless(peer):
        await peer.send(head("Content-Type: image/jpeg", CHUNKED))
        while True:
            await peer.send(in_chunks(b"\xff" * 65536, end=False))

    size = photo.stat().st_size
    async with site(endless=endless, photo=PICTURE) as web:
        with pytest.raises(md.ImageError, match="larger than 1000000 bytes"):
            await md.fetch_image(f"{web.origin}/endless", allow=HERE, max_bytes=1_000_000)
        with pytest.raises(md.ImageError, match=f"larger than {size - 1} bytes"):
            await md.fetch_image(f"{web.origin}/photo", allow=HERE, max_bytes=size - 1)
        image = await md.fetch_image(f"{web.origin}/photo", allow=HERE, max_bytes=size)
    assert image.width == 640


async def test_a_silent_site_runs_into_the_timeout():
    async with site(silent=lambda peer: peer.until_gone()) as web:
        with pytest.raises(md.APITimeoutError) as caught:
            await md.fetch_image(f"{web.origin}/silent", allow=HERE, timeout=0.2)
    assert caught.value.phase == "total"


NO_PICTURES = {
    "html": (whole(b"<p>", kind="text/html"), "text/html"),
    "missing": (whole(b"", status="404 No"), "status 404"),
    "several": (whole(b"", status="300 Several"), "status 300"),
    "moved-to-nowhere": (whole(b"", status="302 Found"), "status 302"),
    "moved-to-no-address": (redirect("http://[::1"), "is no valid address"),
    "no-redirect": (whole(b"<p>", "Location: /it", kind="text/html"), "text/html"),
    "garbage": (whole(b"no picture", kind="image/jpeg"), "not a picture|no picture|can't be"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
async def test_what_is_no_picture_is_refused(name):
    response, reason = NO_PICTURES[name]
    async with site(it=response) as web:
        with pytest.raises(md.ImageError, match=reason):
            await md.fetch_image(f"{web.origin}/it", allow=HERE)


ODD = {
    "ftp://example.com/x", "file:///etc/passwd", "http://", "http://u:p@1.1.1.1/",
    "http://1.1.1.1:x/", "http://1.1.1.1:0/", "http://[::1/", "http://xn--example/",
    "http://user:word@1.1.1.1/", "http://user:wo/rd@[1.1.1.1/", "user:word@1.1.1.1",
    "http://u:word@\u2100/",
}  # fmt: skip


@pytest.mark.parametrize("url", sorted(ODD), ids=ascii)
async def test_odd_addresses_are_refused_and_their_passwords_not_shown(url):
    with pytest.raises(md.ImageError) as caught:
        await md.fetch_image(url)
    assert "word" not in f"{caught.value} {caught.value.__cause__!r}"
    assert "rd" not in str(caught.value)[:12]


@pytest.mark.parametrize("allow", ["127.0.0.0/33", ["1"], 5, [None]], ids=repr)
async def test_networks_that_are_none_are_refused(allow):
    with pytest.raises(md.RequestError, match="allow must name networks"):
        await md.fetch_image("http://127.0.0.1/", allow=allow)


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "0.0.0.0", "100.64.0.1",
    "192.0.0.9", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.1",
    "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0",
    "fec0::1", "fc00::1", "ff02::1", "100::1", "2001:db8::1", "2001::1", "2001:20::1", "3fff::1",
    "5f00::1", "::ffff:10.0.0.1", "::10.0.0.1", "::8.8.8.8", "::ffff:0:10.0.0.1",
    "64:ff9b::a00:1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a00:1::1", "2001:0:a00:1::",
    "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:10.0.0.1", "4000::1", "e000::1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "172.32.0.1", "192.167.255.255", "100.128.0.1", "198.20.0.1",
    "223.255.255.255", "2606:4700::1111", "2a00:1450::1", "2001:4860:4860::8888",
    "::ffff:8.8.8.8", "::ffff:9.255.255.255", "64:ff9b::808:808", "2002:808:808::1",
]  # fmt: skip


def test_only_public_addresses_may_be_reached():
    assert [each for each in PRIVATE + PUBLIC if is_public(parse(each))] == PUBLIC


NEAR = {
    "127.0.0.1": True, "10.1.2.3": True, "172.31.0.1": True, "192.168.1.1": True,
    "169.254.1.1": True, "0.0.0.0": True, "::1": True, "fd00::1": True, "fe80::1%eth0": True,
    "::ffff:10.0.0.1": True, "station": True, "localhost": True, "Station.local.": True,
    "8.8.8.8": False, "134744072": False, "0x8.8.8.8": False, "100.64.0.1": False,
    "192.0.2.1": False, "224.0.0.1": False, "::8.8.8.8": False, "::ffff:8.8.8.8": False,
    "64:ff9b::a00:1": False, "2002:a00:1::": False, "fec0::1": False, "2606:4700::1111": False,
    "example.com": False, "local.example.com": False,
}  # fmt: skip


def test_near_is_the_local_network_and_nothing_else():
    assert {host: is_near_host(host) for host in NEAR} == NEAR
    addresses = {host: address for host in NEAR if (address := parse(host))}
    assert {host: is_near(address) for host, address in addresses.items()} == {
        host: NEAR[host] for host in addresses
    }


SHOWN = {
    "https://example.com/x?y=z": "https://example.com/x?y=z",
    "https://u:word@example.com/": "https://***@example.com/",
    "https://token@example.com/": "https://***@example.com/",
    "u:word@host:3128": "***@host:3128",
    "//u:word@host": "//***@host",
    "http:/u:word@host": "***@host",
    "http://u:wo/rd@host": "http://***@host",
    "http://u:wo@rd@host": "http://***@host",
    "http://u:wo?rd#@host": "http://***@host",
    "http:\\\\u:word@host": "http:\\\\***@host",
    " http://u:word@[::1": " http://***@[::1",
    "https://example.com/@photographer": "https://example.com/@photographer",
}


def test_an_address_is_shown_without_its_password():
    assert {address: shown(address) for address in SHOWN} == SHOWN
