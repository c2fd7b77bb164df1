"""Who may talk to the page's server.

It listens on loopback, and still any web page that its user has open can send
requests to it: by its address, or by a name of its own that it lets point to
127.0.0.1 once it has been loaded ("DNS rebinding"). The first is told by `Origin`
and `Sec-Fetch-Site`, which browsers set and pages can't; the second by `Host`.
"""

from __future__ import annotations

from aiohttp import hdrs, web

HEADERS = {
    # Nothing but what this server sends, and pictures and videos of the page's own making.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob:; media-src blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
"""What every answer carries."""

_NAMES = ("127.0.0.1", "localhost", "[::1]")


def refusal(request: web.Request) -> tuple[int, str] | None:
    """Return the status and the sentence to refuse a request with; None lets it in."""
    transport = request.transport
    port = transport.get_extra_info("sockname")[1] if transport is not None else 0
    names = [f"{name}:{port}" for name in _NAMES]
    if port == 80:
        names += _NAMES  # the port of http is left out
    if request.host.lower() not in names:
        return 421, f"This server answers only as {names[0]}, and not as {request.host}."
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    reads = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    # Links to the page may stand anywhere. A server on another port is the "same site".
    is_link = reads and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if site not in ("same-origin", "none") and not is_link:
        return 403, "This server answers only its own page, and not others."
    # Browsers send it with every POST. Who is none can do so, too.
    if not reads and request.headers.get(hdrs.ORIGIN) != f"http://{request.host}":
        return 403, f"This server takes questions only with 'Origin: http://{request.host}'."
    return None
