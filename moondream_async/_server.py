"""The questions about a server itself: its models, its health, its statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._protocol.answers import read_models, read_stats
from ._protocol.requests import Request
from .errors import NotFoundError, ServerError
from .results import Health, Model, ServerStats

if TYPE_CHECKING:
    from ._call.call import Caller


class ServerQuestions:
    """The calls of `MoondreamClient` that are about the server."""

    _caller: Caller

    async def models(self) -> list[Model]:
        """Return the models that the server offers.

        The cloud's list leaves out some models that work.

        Raises:
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or during the call.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         return await client.models()
        >>> "moondream3-preview" in [model.id for model in asyncio.run(main())]
        True
        """
        request = Request(None, "/models", method="GET", bearer=True)
        return read_models(await self._caller.call(request).json())

    async def health(self) -> Health:
        """Ask the server once, without retries, whether it is healthy.

        Moondream Station and the open engine have an address for this question. Other servers,
        as the cloud, are asked for their models instead.

        Raises:
            APIConnectionError, APITimeoutError: The server can't be reached.
            APIStatusError: The server refuses the request.
            ClientClosedError: The client was closed before or during the call.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         return await client.health()
        >>> asyncio.run(main())
        Health(ok=True, status='ok')
        """
        for path in ("/health", "/healthz"):
            request = Request(None, path, method="GET", at_root=True)
            try:
                raw = await self._caller.call(request, max_retries=0).json()
            except NotFoundError:
                continue
            except ServerError as error:
                if isinstance(error.body, dict) and isinstance(error.body.get("status"), str):
                    return Health(ok=False, status=error.body["status"], raw=error.body)
                raise
            return Health(ok=True, status=str(raw.get("status", "ok")), raw=raw)
        request = Request(None, "/models", method="GET", bearer=True)
        raw = await self._caller.call(request, max_retries=0).json()
        return Health(ok=True, status="ok", raw=raw)

    async def server_stats(self) -> ServerStats:
        """Ask a Moondream Station how busy it is.

        Raises:
            NotFoundError: The server is no Moondream Station.
            APIConnectionError, APITimeoutError, APIStatusError: See `errors`.
            ClientClosedError: The client was closed before or during the call.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         try:
        ...             return (await client.server_stats()).queue_size
        ...         except md.NotFoundError:
        ...             return "not a Moondream Station"
        >>> asyncio.run(main())
        'not a Moondream Station'
        """
        return read_stats(await self._caller.call(Request(None, "/stats", method="GET")).json())
