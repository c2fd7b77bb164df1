"""Pictures fetched from the web, and what is refused."""

import contextlib

import pytest
from aiohttp import web

import moondream_async as md
from moondream_async._transport.fetch import _may_reach

HERE = ["127.0.0.1/32"]


@contextlib.asynccontextmanager
async def site(**routes):
    """A web site on 127.0.0.1; gives its address and the requests it got."""
    requests = []

    async def answer(request):
        requests.append(request)
        return await routes[request.path.strip("/")](request)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    server = web.TCPSite(runner, "127.0.0.1", 0)
    await server.start()
    port = server._server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", requests
    finally:
        await runner.cleanup()


def gives(**response):
    async def answer(request):
        return web.Response(**response)

    return answer


def picture(photo):
    return gives(body=photo.read_bytes(), content_type="image/jpeg")


def redirect(target):
    return gives(status=302, headers={"Location": target})


async def test_a_picture_is_fetched_and_prepared(photo, client):
    async with site(photo=picture(photo)) as (address, requests):
        image = await md.fetch_image(f"{address}/photo", allow=HERE)
    assert (image.media_type, image.width, image.height) == ("image/jpeg", 640, 480)
    assert "moondream" in requests[0].headers["User-Agent"]
    assert "JPEG picture" in (await client.caption(image)).caption


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "169.254.169.254", "127.1"],
)
async def test_addresses_inside_are_refused_before_anything_is_sent(host, photo):
    async with site(photo=picture(photo)) as (address, requests):
        port = address.rpartition(":")[2]
        with pytest.raises(md.ImageError, match=r"not on the public internet|not a canonical"):
            await md.fetch_image(f"http://{host}:{port}/photo")
    assert requests == []


async def test_a_redirect_to_an_address_inside_is_refused(photo):
    async with site(photo=picture(photo), away=redirect("http://127.0.0.2:1/x")) as (address, _):
        with pytest.raises(md.ImageError, match="not on the public internet"):
            await md.fetch_image(f"{address}/away", allow=HERE)


async def test_a_redirect_to_a_name_that_resolves_inside_is_refused(photo):
    async with site(away=redirect("http://127.0.0.1.localhost:1/x")) as (address, _):
        with pytest.raises((md.ImageError, md.APIConnectionError)) as caught:
            await md.fetch_image(f"{address}/away", allow=["127.0.0.1/32"])
    # Where such names resolve, they resolve to an allowed address and nobody listens there.
    assert "photo" not in str(caught.value)


async def test_a_redirect_is_followed_and_relative_ones_too(photo):
    async with site(photo=picture(photo), away=redirect("/photo")) as (address, requests):
        image = await md.fetch_image(f"{address}/away", allow=HERE)
    assert image.width == 640
    assert [request.path for request in requests] == ["/away", "/photo"]


async def test_redirects_in_circles_end():
    async with site(round=redirect("/round")) as (address, requests):
        with pytest.raises(md.ImageError, match="redirects more than 5 times"):
            await md.fetch_image(f"{address}/round", allow=HERE)
    assert len(requests) == 6


async def test_more_than_max_bytes_is_not_read(photo):
    async def endless(request):
        response = web.StreamResponse(headers={"Content-Type": "image/jpeg"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"\xff" * 65536)
        return response

    async with site(endless=endless) as (address, _):
        with pytest.raises(md.ImageError, match="larger than 1000000 bytes"):
            await md.fetch_image(f"{address}/endless", allow=HERE, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        pytest.param(gives(text="<p>", content_type="text/html"), "text/html", id="html"),
        pytest.param(gives(status=404), "status 404", id="missing"),
        pytest.param(
            gives(body=b"no picture", content_type="image/jpeg"),
            "not a picture|no picture|can't be",
            id="garbage",
        ),
    ],
)
async def test_what_is_no_picture_is_refused(response, reason):
    async with site(it=response) as (address, _):
        with pytest.raises(md.ImageError, match=reason):
            await md.fetch_image(f"{address}/it", allow=HERE)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/x",
        "file:///etc/passwd",
        "http://",
        "http://u:p@1.1.1.1/",
        "http://1.1.1.1:x/",
    ],
)
async def test_odd_addresses_are_refused(url):
    with pytest.raises(md.ImageError):
        await md.fetch_image(url)


async def test_a_silent_site_runs_into_the_timeout():
    import anyio

    async def silent(request):
        await anyio.sleep_forever()

    async with site(silent=silent) as (address, _):
        with pytest.raises(md.APITimeoutError) as caught:
            await md.fetch_image(f"{address}/silent", allow=HERE, timeout=0.2)
    assert caught.value.phase == "total"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::",
    ],
)  # fmt: skip
def test_only_public_addresses_may_be_reached(address):
    assert not _may_reach(address, networks=())
