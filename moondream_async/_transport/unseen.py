"""Secret headers: they are sent, and kept out of requests that errors and traces refer to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiohttp import hdrs
from multidict import CIMultiDict

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

    from moondream_async._protocol.secret import Secret


class Unseen:
    """Adds secret headers to a request while it is sent, and removes them afterwards.

    It is a middleware of aiohttp, and the innermost. So the secrets are in no variable of an
    error's frames, in no trace, and not in the request that aiohttp's errors and answers hold.
    """

    __slots__ = ("_for_proxy", "_headers")

    def __init__(self, headers: Mapping[str, Secret], for_proxy: Secret | None = None) -> None:
        self._headers = headers
        self._for_proxy = for_proxy

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Send a request with the secret headers."""
        try:
            for name, secret in self._headers.items():
                request.headers[name] = secret.reveal()
            if self._for_proxy is not None:
                # With TLS the proxy gets a request for a tunnel, else the request itself.
                head = request.proxy_headers = CIMultiDict()
                (head if request.is_ssl() else request.headers)[hdrs.PROXY_AUTHORIZATION] = (
                    self._for_proxy.reveal()
                )
            return await handler(request)
        finally:
            for name in self._headers:
                request.headers.popall(name, None)
            if self._for_proxy is not None:
                request.headers.popall(hdrs.PROXY_AUTHORIZATION, None)
                request.proxy_headers = None
