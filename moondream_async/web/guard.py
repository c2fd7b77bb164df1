"""Refuses requests that do not come from the demo page.

The server listens on loopback; still, any web page in the user's browser can send
requests to it: to its address, or to a host name of the page's own that points to
127.0.0.1 after the page has loaded ("DNS rebinding"). `Origin` and `Sec-Fetch-Site`,
which browsers set and pages can't, reveal the first kind; `Host` reveals the second.
"""

from __future__ import annotations

from aiohttp import hdrs, web

HEADERS = {
    # Only files of this server, and pictures and videos that the page itself makes.
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
"""The headers of every response."""

_NAMES = ("127.0.0.1", "localhost", "[::1]")


def refusal(request: web.Request) -> tuple[int, str] | None:
    """Return the status and the message to refuse a request with, or None to accept it."""
    transport = request.transport
    port = transport.get_extra_info("sockname")[1] if transport is not None else 0
    names = [f"{name}:{port}" for name in _NAMES]
    if port == 80:
        names += _NAMES  # browsers leave out the port of http
    if request.host.lower() not in names:
        return 421, f"This server answers only as {names[0]}, and not as {request.host}."
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    reads = request.method in (hdrs.METH_GET, hdrs.METH_HEAD)
    # Any site may link to the page. A server on another port is "same-site".
    is_link = reads and request.headers.get("Sec-Fetch-Mode") == "navigate"
    if site not in ("same-origin", "none") and not is_link:
        return 403, "This server answers only its own page, and not others."
    # Browsers send `Origin` with every POST; other clients have to send it too.
    if not reads and request.headers.get(hdrs.ORIGIN) != f"http://{request.host}":
        return 403, f"This server takes questions only with 'Origin: http://{request.host}'."
    return None
