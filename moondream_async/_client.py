"""The client, which holds the connections; its calls are in `_skills` and `_server`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack, overload

from ._checks import check_count, check_positive, check_ssl_context, is_number
from ._protocol.headers import check_headers
from ._protocol.secret import Secret, hidden
from ._server import ServerQuestions
from ._skills import Skills
from .errors import RequestError
from .results import ClientStats
from .types import Hooks, Timeout, to_timeout

if TYPE_CHECKING:
    import ssl
    from typing import Self

    import aiohttp
    from yarl import URL

    from ._stream.kinds import CaptionStream, QueryStream, SegmentStream
    from .batch.batches import Batches
    from .bulk.items import BulkOptions, ItemT
    from .bulk.run import BulkRun, Items
    from .results import (
        CaptionResult,
        DetectResult,
        PointResult,
        QueryResult,
        SegmentResult,
    )
    from .tuning.finetunes import Tuning
    from .watch.items import Frames, FrameT, WatchOptions
    from .watch.run import Watch

_DEFAULT_TIMEOUT = Timeout()
_NO_HOOKS = Hooks()


class MoondreamClient(Skills, ServerQuestions):
    """A session with a Moondream server: the cloud, Moondream Station, or a compatible server.

    A client can be made anywhere, also outside of an event loop, and used from several event
    loops in several threads at once. `aclose` it, or leave its ``async with``.

    Args:
        api_key: The API key; by default the environment variable MOONDREAM_API_KEY. The
            cloud needs a key, other servers don't. White space around it is removed; a key
            of white space alone is no key.
        endpoint: The server's address with its ``/v1``; by default the environment variable
            MOONDREAM_ENDPOINT, or else the cloud.
        model: The model for calls that name none; None leaves it to the server.
        timeout: The time limits, in seconds; a number is the limit `total`.
        max_retries: How often a call that failed before its first event is sent again.
        max_connections: How many calls and streams may have a request open at once.
        rate_limit: Requests a second, retries included; None is no limit. The cloud
            allows 2, or 10 for funded accounts (docs.moondream.ai/rate-limits).
        session: Your own aiohttp session to send with, which is not closed. It belongs to
            one event loop, and then so does the client. It connects as you have set it up:
            with its own proxies and its own resolver.
        ssl_context: For servers whose certificate the system doesn't know.
        proxy: The address of an HTTP proxy, as ``http://user:password@proxy:3128``. None
            takes the proxies of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY,
            NO_PROXY), except for loopback addresses and with a `session`; False uses none.
        max_pixels: The highest width times height; larger pictures are made smaller. None
            leaves pictures as they are. The model looks at less than 2 million pixels
            (docs.moondream.ai: 12 crops of 378 pixels, and a view of the whole).
        hooks: Functions that are notified of requests, first pieces, retries and ends.
        headers: Sent with each request to the endpoint, beside the client's own headers.
        insecure_hosts: Names of hosts, or one name, to which the key may be sent over plain
            ``http``. Loopback and private addresses, and names of the local network, need
            not be listed; but such a name must be if it resolves to a public address, since
            the address that is connected to is checked, too.

    Raises:
        RequestError: An argument is wrong, or the cloud is used without a key.

    >>> async def main():
    ...     async with md.MoondreamClient(timeout=90, max_retries=5) as client:
    ...         await client.caption(md.SAMPLE_IMAGE)
    ...         return client.stats().requests
    >>> asyncio.run(main())
    1
    """

    def __init__(
        self,
        api_key: str | Secret | None = None,
        endpoint: str | URL | Secret | None = None,
        *,
        model: str | None = None,
        timeout: Timeout | float = _DEFAULT_TIMEOUT,
        max_retries: int = 3,
        max_connections: int = 100,
        rate_limit: float | None = None,
        session: aiohttp.ClientSession | None = None,
        ssl_context: ssl.SSLContext | None = None,
        proxy: str | URL | Secret | Literal[False] | None = None,
        max_pixels: int | None = None,
        hooks: Hooks = _NO_HOOKS,
        headers: Mapping[str, str] | None = None,
        insecure_hosts: Collection[str] = (),
    ) -> None:
        # First of all, since a traceback may show the values of variables.
        key, where, through = hidden(api_key), hidden_address(endpoint), hidden_address(proxy)
        del api_key, endpoint, proxy
        # These imports load aiohttp, which takes a third of a second. In the first await they
        # would block the event loop; at the top of the module they would slow down programs
        # that import the package and make no client.
        from ._call.call import Caller  # noqa: PLC0415
        from ._call.session import Session  # noqa: PLC0415
        from ._transport.endpoints import read_target  # noqa: PLC0415
        from ._transport.pools import Transport  # noqa: PLC0415

        check_ssl_context(ssl_context)
        target = read_target(
            key, where, through, insecure_hosts=insecure_hosts, own_session=session is None
        )
        check_model(model)
        check_count("max_retries", max_retries, least=0)
        check_count("max_connections", max_connections)
        if rate_limit is not None:
            check_positive("rate_limit", rate_limit, "a number of requests a second, over 0")
        if max_pixels is not None:
            check_count("max_pixels", max_pixels)
        if not isinstance(hooks, Hooks):
            raise RequestError(f"hooks must be Hooks, not {hooks!r}")
        self._model = model
        shared = Session(
            target.endpoint,
            target.key,
            max_connections=max_connections,
            rate_limit=rate_limit,
            max_pixels=max_pixels,
            hooks=hooks,
            transport=Transport(
                session=session,
                ssl_context=ssl_context,
                proxies=target.proxies,
                guard=target.guard,
            ),
            proxy_secrets=target.proxies.secrets,
        )
        self._caller = Caller(
            shared,
            timeout=to_timeout(timeout),
            max_retries=max_retries,
            headers=check_headers(headers),
        )

    # -- state --------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The server's address."""
        return self._caller.endpoint

    @property
    def closed(self) -> bool:
        """Whether the client was closed: every further call raises `ClientClosedError`."""
        return self._caller.closed

    def with_options(
        self,
        *,
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str] | None = None,
        model: str | None = None,
    ) -> Self:
        """Return a client with other options over the same connections, limits and budget.

        An option that is None stays as it is; `headers` are added to the headers of this client.
        Closing the returned client leaves this client open; closing this client closes both.

        Raises:
            RequestError: An option is wrong.

        >>> client = MoondreamClient(endpoint="http://127.0.0.1:2020/v1")
        >>> patient = client.with_options(timeout=Timeout(first_event=600), max_retries=0)
        """
        if max_retries is not None:
            check_count("max_retries", max_retries, least=0)
        check_model(model)
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._caller = self._caller.with_options(
            timeout=None if timeout is None else to_timeout(timeout),
            max_retries=max_retries,
            headers=check_headers(headers),
        )
        other._model = self._model if model is None else model
        return other

    @property
    def batches(self) -> Batches:
        """The server's Batch API: many requests in a file, answered when the server has time."""
        from .batch.batches import Batches  # noqa: PLC0415 - most programs need no batches

        return Batches(self._caller, self._model)

    @overload
    def bulk(
        self,
        items: Items[ItemT],
        skill: Literal["caption"] = "caption",
        **options: Unpack[BulkOptions],
    ) -> BulkRun[ItemT, CaptionResult]: ...

    @overload
    def bulk(
        self, items: Items[ItemT], skill: Literal["query"], **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, QueryResult]: ...

    @overload
    def bulk(
        self, items: Items[ItemT], skill: Literal["detect"], **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, DetectResult]: ...

    @overload
    def bulk(
        self, items: Items[ItemT], skill: Literal["point"], **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, PointResult]: ...

    @overload
    def bulk(
        self, items: Items[ItemT], skill: Literal["segment"], **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, SegmentResult]: ...

    @overload
    def bulk(
        self, items: Items[ItemT], skill: str, **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, Any]: ...

    def bulk(
        self,
        items: Items[ItemT],
        skill: str = "caption",
        *,
        ordered: bool = False,
        concurrency: int | None = None,
        max_retries: int | None = None,
        **arguments: Any,
    ) -> BulkRun[ItemT, Any]:
        """Ask the same about many pictures; iterate over their results.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         pictures = [md.SAMPLE_IMAGE]  # or Path("photos").rglob("*.jpg"), or any others
        ...         async with client.bulk(pictures, "detect", object="red circle") as run:
        ...             async for each in run:
        ...                 print(each.item.name, each.result.objects if each.ok else each.error)
        >>> asyncio.run(main())
        sample.jpg [Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)]

        The number of open requests follows the server: few at first, more while it keeps up,
        fewer when it fails or slows down. After a 429 the run also limits its requests a
        second. `max_connections` and `rate_limit` apply, too. An item is taken from `items` only
        when its request can start, and not while twice as many results as open requests wait to
        be read.

        A request that fails is tried again as in other calls; so is one that runs out of time.
        A refusal (429) does not count as a try while the server accepts other requests. A pause
        that the server asks for (``Retry-After``) pauses the whole run, for a minute at most
        (`BulkRun.paused_for`). An item that fails for good gives a result with an `error`, and
        the run goes on. A wrong key, a closed client, a server that refuses every request, and
        an error of `items` itself end the run, after the results that have arrived.

        Args:
            items: Pictures as `caption` takes them, `BulkItem`s, or mappings with the
                keys of a `BulkItem`, in any iterable or asynchronous iterable. An ordinary
                iterable is read in the event loop, and should not block it.
            skill: ``caption``, ``query``, ``detect``, ``point`` or ``segment``.
            ordered: Whether results come in the order of the items, or as they finish.
            concurrency: The highest number of open requests, if below `max_connections`.
            max_retries: How often an item that failed is tried again; None is the client's.
            arguments: The skill's arguments, for all items: `question`, `object`, `length`,
                `settings`, `model`, ...

        Raises:
            RequestError: An argument is wrong; nothing was sent.
        """
        from .bulk.items import Asking  # noqa: PLC0415 - most programs don't need it
        from .bulk.run import BulkRun, check_items  # noqa: PLC0415 - likewise

        check_items(items)
        if concurrency is not None:
            check_count("concurrency", concurrency)
        if max_retries is not None:
            check_count("max_retries", max_retries, least=0)
        return BulkRun(
            self._caller,
            items,
            Asking(skill, arguments, model=self._model),
            ordered=ordered,
            concurrency=concurrency,
            max_retries=max_retries,
        )

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["caption"] = "caption",
        *,
        stream: Literal[False] = False,
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, CaptionResult]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["caption"] = "caption",
        *,
        stream: Literal[True],
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, CaptionStream]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["query"],
        *,
        stream: Literal[False] = False,
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, QueryResult]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["query"],
        *,
        stream: Literal[True],
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, QueryStream]: ...

    @overload
    def watch(
        self, frames: Frames[FrameT], skill: Literal["detect"], **options: Unpack[WatchOptions]
    ) -> Watch[FrameT, DetectResult]: ...

    @overload
    def watch(
        self, frames: Frames[FrameT], skill: Literal["point"], **options: Unpack[WatchOptions]
    ) -> Watch[FrameT, PointResult]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["segment"],
        *,
        stream: Literal[False] = False,
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, SegmentResult]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: Literal["segment"],
        *,
        stream: Literal[True],
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, SegmentStream]: ...

    @overload
    def watch(
        self,
        frames: Frames[FrameT],
        skill: str,
        *,
        stream: bool = False,
        **options: Unpack[WatchOptions],
    ) -> Watch[FrameT, Any]: ...

    def watch(
        self,
        frames: Frames[FrameT],
        skill: str = "caption",
        *,
        in_flight: int = 1,
        max_age: float | None = None,
        on_error: str = "skip",
        supersede: bool = False,
        stream: bool = False,
        **arguments: Any,
    ) -> Watch[FrameT, Any]:
        """Ask the same about moving pictures, again and again: the newest frame wins.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         pictures = [md.SAMPLE_IMAGE]  # or what a camera gives, as `frames.camera(0)`
        ...         async with client.watch(pictures, "detect", object="red circle") as answers:
        ...             async for each in answers:
        ...                 print(each.age > 0, each.result.objects if each.ok else each.error)
        >>> asyncio.run(main())
        True [Region(x_min=0.0938, y_min=0.375, x_max=0.3438, y_max=0.7083)]

        Frames are read as they come, and a new frame replaces the frame that waits; a
        superseded frame is never prepared nor sent. A call takes its frame only when it has its
        connection slot and `rate_limit` lets it send. So the age of an answer is the time of one
        call and one frame, however slow the server and however fast the camera. No request is
        made while no task reads the results. The last frame is always asked about.

        Results come in the order of the frames. A result that is older than one already given,
        or than `max_age`, is dropped and counted. A frame that failed is not tried again: the
        next frame follows, after a pause that grows with each failure in a row.
        `max_connections`, `rate_limit`, hooks and `stats` work as for any call. A wrong key, a
        closed client, and an error of `frames` itself end the watch.

        Args:
            frames: Pictures as `caption` takes them, or `Frame`s, in any iterable or
                asynchronous iterable. An ordinary iterable may block: it is read in a thread
                of its own. It is not closed.
            skill: ``caption``, ``query``, ``detect``, ``point`` or ``segment``.
            in_flight: How many frames may be asked about at once.
            max_age: The age in seconds at which an answer is dropped.
            on_error: What happens when a frame fails: ``skip`` gives a result with its `error`,
                and goes on with the next frame; ``raise`` raises the error and ends the watch.
            supersede: Whether a new frame cancels the oldest call when `in_flight` calls are
                open. For frames that come rarely, as when something has moved: with a camera,
                no call would ever finish.
            stream: Whether each result is a stream, for skills that have streams. The next
                result closes it; with `supersede`, so does the next frame.
            arguments: The skill's arguments: `question`, `object`, `length`, `settings`, ...

        Raises:
            RequestError: An argument is wrong; nothing was sent.
        """
        from .watch.asking import Question  # noqa: PLC0415 - most programs don't need it
        from .watch.run import Watch, check_frames  # noqa: PLC0415 - likewise

        check_frames(frames)
        check_count("in_flight", in_flight)
        if max_age is not None:
            check_positive("max_age", max_age, "a number of seconds over 0")
        if on_error not in ("skip", "raise"):
            raise RequestError(f"on_error must be 'skip' or 'raise', not {on_error!r}")
        return Watch(
            Question(self._caller, skill, arguments, stream=stream, model=self._model),
            frames,
            in_flight=in_flight,
            max_age=max_age,
            raises=on_error == "raise",
            supersede=supersede,
        )

    def caption_many(
        self, images: Items[ItemT], **options: Unpack[BulkOptions]
    ) -> BulkRun[ItemT, CaptionResult]:
        """Describe many pictures; the same as `bulk` with the skill ``caption``.

        >>> async def main():
        ...     async with md.MoondreamClient() as client:
        ...         async for each in client.caption_many([md.SAMPLE_IMAGE], length="short"):
        ...             print(each.ok, each.seconds < 60)
        >>> asyncio.run(main())
        True True
        """
        return self.bulk(images, "caption", **options)

    @property
    def tuning(self) -> Tuning:
        """Finetunes: the cloud's model, trained on your own tasks."""
        from .tuning.finetunes import Tuning  # noqa: PLC0415 - most programs need no finetunes

        return Tuning(self._caller)

    def stats(self) -> ClientStats:
        """Return counts of what the client is doing and has done, in all its event loops.

        >>> md.MoondreamClient(endpoint="http://127.0.0.1:2020/v1").stats().open_streams
        0
        """
        return self._caller.stats()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A MoondreamClient can't be copied: another process makes its own, and with_options() "
            "gives one over the same connections"
        )

    def __repr__(self) -> str:
        caller = getattr(self, "_caller", None)
        if caller is None:  # `__init__` failed, and an error report shows the object
            return "<MoondreamClient>"
        state = "closed" if caller.closed else f"{caller.session.slots.taken} open"
        return f"<MoondreamClient {caller.endpoint}, {state}>"

    async def __aenter__(self) -> Self:
        self._caller.check_open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self, grace: float | None = None) -> None:
        """Close all connections in all event loops; from any loop, and more than once.

        Calls and streams that are still open get a `ClientClosedError`. With `grace`, they have
        so many seconds to finish first; new calls are refused at once.

        >>> async def main():
        ...     client = md.MoondreamClient()
        ...     try:
        ...         return await client.health()
        ...     finally:
        ...         await client.aclose(grace=1)
        >>> asyncio.run(main())
        Health(ok=True, status='ok')
        """
        if grace is not None and not is_number(grace, least=0):
            raise RequestError(f"grace must be a number of seconds, or None, not {grace!r}")
        await self._caller.aclose(grace)


def vl(
    api_key: str | Secret | None = None,
    endpoint: str | URL | Secret | None = None,
    local: bool = False,  # noqa: FBT001, FBT002 - where the official SDK has it
    model: str | None = None,
    **options: Any,
) -> MoondreamClient:
    """Return a `MoondreamClient`; named as in the official SDK.

    Raises:
        RequestError: ``local=True``, or as for `MoondreamClient`.

    >>> md.vl(endpoint="http://127.0.0.1:2020/v1")
    <MoondreamClient http://127.0.0.1:2020/v1, 0 open>
    """
    api_key, endpoint = hidden(api_key), hidden_address(endpoint)
    if "proxy" in options:
        options["proxy"] = hidden_address(options["proxy"])
    if local:
        raise RequestError(
            "local=True would run the model in this process, which needs the official package "
            "'moondream' and a GPU; this one talks to servers: start Moondream Station and pass "
            "endpoint='http://127.0.0.1:2020/v1'."
        )
    return MoondreamClient(api_key, endpoint, model=model, **options)


def photon(*arguments: object, **options: object) -> NoReturn:
    """Raise `RequestError`: the official SDK's `photon` runs models in this process.

    Raises:
        RequestError: Always; it says what to do.

    >>> md.photon()
    Traceback (most recent call last):
        ...
    moondream_async.errors.RequestError: photon would run the model in this process, which needs ...
    """
    del arguments, options  # the API key may be among them
    raise RequestError(
        "photon would run the model in this process, which needs the official package "
        "'moondream' and a GPU; this one talks to servers: start Moondream Station and pass "
        "endpoint='http://127.0.0.1:2020/v1'."
    )


def check_model(model: Any) -> None:
    """Raise `RequestError` unless `model` is the name of a model, or None."""
    if model is not None and not (isinstance(model, str) and model.strip()):
        raise RequestError(f"model must be the name of a model, not {model!r}")


def hidden_address(address: Any) -> Any:
    """Return an address as a secret, since it may hold a password; False stays False."""
    if address is False:
        return False
    return hidden(str(address) if hasattr(address, "raw_password") else address)
