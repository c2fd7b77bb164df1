"""What all calls of a client share: connections, limits, counts, the key."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from yarl import URL

from moondream_async._images import encode_at_once, encode_image, encode_small_file
from moondream_async._protocol import USER_AGENT
from moondream_async._protocol.headers import joined
from moondream_async._protocol.secret import Redactor, Secret
from moondream_async._transport.pools import NO_SECRETS, Transport
from moondream_async._transport.workers import ShortJobs, Workers
from moondream_async.errors import ClientClosedError
from moondream_async.results import ClientStats
from moondream_async.types import EncodedImage, Hooks

from .limits import RateLimiter, Semaphore
from .report import Instrument
from .retry import Budget

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from moondream_async._protocol.requests import Request

_PICTURES_AT_ONCE = 4
"""How many pictures are prepared at once: each may hold a decoded copy in memory."""

_preparing = Workers("pictures", _PICTURES_AT_ONCE)

new_session_listeners: list[Callable[[Session], object]] = []
"""Called with each new session, as for tracing all clients of a program."""


class Session:
    """The connections, limits, counts and address of a client; for any loop and thread."""

    def __init__(
        self,
        endpoint: str,
        key: Secret | None,
        *,
        max_connections: int,
        rate_limit: float | None,
        max_pixels: int | None,
        hooks: Hooks,
        transport: Transport,
        proxy_secrets: Iterable[Secret] = (),
    ) -> None:
        self.closed = False
        self.endpoint = endpoint
        self.key = key
        self.secret = Redactor(key, *proxy_secrets)
        """Takes the key, and passwords of proxies, out of errors."""
        self.max_pixels = max_pixels
        self.hooks = hooks
        self.instruments: tuple[Instrument, ...] = ()
        """Called for each call, as for tracing."""
        self.transport = transport
        self._as_key: Mapping[str, Secret] = {} if key is None else {"X-Moondream-Auth": key}
        self._as_bearer: Mapping[str, Secret] = (
            {} if key is None else {"Authorization": key.prefixed("Bearer ")}
        )
        self._max_connections = max_connections
        self._rate_limit = rate_limit
        self._begin()
        _all.add(self)
        for listener in new_session_listeners:
            listener(self)

    def _begin(self) -> None:
        """Start with nothing open and nothing counted; called again in a forked child."""
        most, rate = self._max_connections, self._rate_limit
        self.budget = Budget()
        self.slots = Semaphore(most)
        """One slot for each connection that may be in use."""
        self.preparing = Semaphore(max(most, 2 * _PICTURES_AT_ONCE))
        """One slot for each picture that is being prepared, or waits for a connection slot."""
        # Two limiters, since one can't do both: `admission` keeps a long queue of calls from
        # running into `Timeout.pool`; `rate_limiter` keeps the rate exactly, just before sending.
        self.admission = None if rate is None else RateLimiter(rate)
        self.rate_limiter = None if rate is None else RateLimiter(rate)
        self._lock = threading.RLock()  # see `limits` on why its own thread may take it again
        self._counts = dict.fromkeys(("requests", "retries", "bytes_sent", "bytes_received"), 0)

    def apart(self) -> Session:
        """Return a session with its own connections, for a request that no limit may delay.

        It waits in no queue, and works even if this session is closed.
        """
        session = Session(
            self.endpoint,
            self.key,
            max_connections=1,
            rate_limit=None,
            max_pixels=self.max_pixels,
            hooks=self.hooks,
            transport=self.transport.apart(),
        )
        session.secret = self.secret
        session.instruments = self.instruments
        return session

    def check_open(self) -> None:
        """Raise `ClientClosedError` if the client was closed."""
        if self.closed:
            raise ClientClosedError("The client is closed")

    async def aclose(self, grace: float | None) -> None:
        """Refuse further calls, and close all connections in every loop."""
        self.closed = True
        await self.transport.aclose(grace)

    # -- counts ---------------------------------------------------------------------

    def count(
        self, *, requests: int = 0, retries: int = 0, bytes_sent: int = 0, bytes_received: int = 0
    ) -> None:
        """Add to the counts that `stats` returns; from any thread."""
        with self._lock:
            counts = self._counts
            counts["requests"] += requests
            counts["retries"] += retries
            counts["bytes_sent"] += bytes_sent
            counts["bytes_received"] += bytes_received

    def release(self, received: int) -> None:
        """Note the end of an answer, and release its connection slot.

        A body holds this method, and so keeps the session alive: a stream goes on when its
        client was dropped. It does not hold the call, whose pictures may be large.
        """
        self.slots.release()
        self.count(bytes_received=received)

    def stats(self) -> ClientStats:
        """Return counts of what the client is doing and has done."""
        pooled = self.transport.idle_connections  # under a lock of its own
        with self._lock:
            return ClientStats(
                open_streams=self.slots.taken,
                waiting_calls=self.slots.waiting,
                pooled_connections=pooled,
                **self._counts,
            )

    # -- requests -------------------------------------------------------------------

    def encode_at_once(self, image: Any) -> EncodedImage | None:
        """Return a picture that takes hardly any work to prepare; None if it needs a thread."""
        limit = self.max_pixels
        if isinstance(image, EncodedImage):
            return image if limit is None or image.width * image.height <= limit else None
        return encode_at_once(image, max_pixels=limit)

    async def encode(
        self, image: Any, *, max_pixels: int | None = None, max_bytes: int | None = None
    ) -> EncodedImage:
        """Prepare a picture, in a thread unless that takes hardly any time."""
        limit = self.max_pixels if max_pixels is None else max_pixels
        if max_bytes is None and limit == self.max_pixels:
            ready = self.encode_at_once(image)
            if ready is not None:
                return ready
        more = {} if max_bytes is None else {"max_bytes": max_bytes}
        return await _preparing.submit(encode_image, image, max_pixels=limit, **more)

    def encode_small(self, image: Any, jobs: ShortJobs) -> asyncio.Future[EncodedImage | None]:
        """Begin to prepare a file if it is small; the future gives None if it is not."""
        return jobs.submit(partial(encode_small_file, image, max_pixels=self.max_pixels))

    def encode_later(self, image: Any) -> asyncio.Future[EncodedImage]:
        """Begin to prepare a picture in a thread; the future gives it."""
        return _preparing.submit(encode_image, image, max_pixels=self.max_pixels)

    def url(self, request: Request) -> URL:
        """Return the address of a request."""
        if request.elsewhere:
            return URL(request.path, encoded=True)
        base = self.endpoint.removesuffix("/v1") if request.at_root else self.endpoint
        return URL(base + request.path, encoded=True)

    def headers(self, accept: str, request: Request, more: Mapping[str, str]) -> dict[str, str]:
        """Return the headers of a request that hold no secret."""
        own = {
            "User-Agent": USER_AGENT,
            "Accept": accept,
            # Answers are small, and compression could hold back pieces of a stream.
            "Accept-Encoding": "identity",
        }
        return joined(own, more) if more and not request.elsewhere else own

    def secrets(self, request: Request) -> Mapping[str, Secret]:
        """Return the headers of a request that hold the key."""
        if request.elsewhere:
            return NO_SECRETS
        return self._as_bearer if request.bearer else self._as_key

    def redact(self, data: bytes) -> bytes:
        """Return the body of an error without secrets; answers are never changed."""
        return self.secret.data(data)


_all: weakref.WeakSet[Session] = weakref.WeakSet()


def _begin_all() -> None:
    for session in tuple(_all):
        session._begin()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all)
