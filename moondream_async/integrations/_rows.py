"""One question about every row of a table: what the libraries for tables share here.

A `Job` says what is asked, of which column and by what client. It is checked
where it is made, and travels to workers as data. There an `Asker` carries it out:
rows go in, a mapping of answer columns comes out for each, in which a row that
failed has its error as a value.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast

import msgspec

from moondream_async._checks import check_count
from moondream_async._client import MoondreamClient, hidden_address
from moondream_async._protocol.requests import (
    Request,
    caption_request,
    detect_request,
    point_request,
    query_request,
)
from moondream_async._protocol.secret import Secret, hidden
from moondream_async.errors import (
    AuthenticationError,
    ClientClosedError,
    ImageError,
    MoondreamError,
    RequestError,
)
from moondream_async.results import Result
from moondream_async.types import Length, Settings, Timeout

if TYPE_CHECKING:
    from anyio import Semaphore
    from anyio.from_thread import BlockingPortal

CONNECTIONS = 32
"""Requests that a worker has open at once, by default. The cloud's 10 requests a second at
three seconds an answer keep 30 of them busy."""

_ADDRESSES = frozenset({"endpoint", "proxy"})


def kept(api_key: object, options: Mapping[str, Any]) -> tuple[Secret | None, dict[str, Any]]:
    """Return a key and options that show no secret, before anything can go wrong."""
    addresses = {name: hidden_address(options[name]) for name in options.keys() & _ADDRESSES}
    return hidden(api_key), {**options, **addresses}


class Options(TypedDict, total=False):
    """What a skill takes for all rows alike, and what `MoondreamClient` takes in each worker."""

    length: Length
    question: str
    reasoning: bool
    object: str
    settings: Settings

    endpoint: str
    model: str
    timeout: Timeout
    max_retries: int
    max_connections: int  # of each worker; 32 by default
    rate_limit: float  # of all workers together
    proxy: str
    max_pixels: int
    insecure_hosts: Sequence[str]


class _Skill(NamedTuple):
    request: Callable[..., Request]
    """Checks the arguments."""
    answer: str
    """The field of the result that is the answer, and the name of its column."""
    text: str | None = None
    """The argument that may differ from row to row."""
    arguments: Mapping[str, Any] = {}
    """The other options, with their defaults."""


_SKILLS = {
    "caption": _Skill(
        partial(caption_request, stream=False), "caption", arguments={"length": "normal"}
    ),
    "query": _Skill(
        partial(query_request, stream=False, spatial_refs=None),
        "answer",
        "question",
        {"reasoning": None},
    ),
    "detect": _Skill(detect_request, "objects", "object"),
    "point": _Skill(partial(point_request, spatial_refs=None), "points", "object"),
}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked about every row, and by what client.

    Raises:
        RequestError: Something in it can't be right. No I/O was done.
    """

    skill: str
    image_column: str = "image"
    text_column: str | None = None
    prefix: str = ""
    workers: int = 1
    """Clients that carry it out at once, and share the rate limit."""
    api_key: Secret | None = None
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.skill not in _SKILLS:
            raise RequestError(f"skill must be one of {', '.join(_SKILLS)}, not {self.skill!r}")
        for name in ("image_column", "text_column"):
            column = getattr(self, name)
            if not (isinstance(column, str) and column) and (column or name == "image_column"):
                raise RequestError(f"{name} must be the name of a column, not {column!r}")
        if not isinstance(self.prefix, str):
            raise RequestError(f"prefix must be a string, not {self.prefix!r}")
        check_count("the number of workers", self.workers)
        self._check_arguments()
        # What a worker finds in its environment is not known here: any address will do
        # in place of that, as long as a key may be sent there.
        self._client(endpoint=self.options.get("endpoint") or "http://localhost/v1")

    def _check_arguments(self) -> None:
        skill = _SKILLS[self.skill]
        known = {skill.text, "settings", *skill.arguments, *_CLIENT_OPTIONS}
        unknown = sorted(self.options.keys() - known)
        if unknown:
            raise RequestError(f"{self.skill} takes no {', '.join(unknown)}")
        text = {}
        if self.text_column is not None:
            if skill.text is None or skill.text in self.options:
                other = skill.text or "text of any kind"
                raise RequestError(f"text_column: {self.skill} has its {other} otherwise")
            text = {skill.text: "in each row"}
        elif skill.text is not None and skill.text not in self.options:
            raise RequestError(f"{self.skill} needs {skill.text}= or text_column=")
        arguments = {"settings": None, **skill.arguments, **self.arguments, **text}
        skill.request(b"in each row", model=self.options.get("model"), **arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the skill is called with for every row."""
        return {k: v for k, v in self.options.items() if k not in _CLIENT_OPTIONS}

    @property
    def connections(self) -> int:
        """How many requests a worker has open at once."""
        return cast("int", self.options.get("max_connections", CONNECTIONS))

    @property
    def columns(self) -> dict[str, str]:
        """The names of the columns that it adds, by the names of what is in them."""
        answers = [_SKILLS[self.skill].answer]
        if self.options.get("reasoning"):
            answers.append("reasoning")
        fields = (*answers, "request_id", "finish_reason", "error_type", "error_message")
        return {field: self.prefix + field for field in fields}

    def check_columns(self, present: Sequence[str]) -> None:
        """Check that the rows have the columns that are read, and none that would be lost.

        Raises:
            RequestError: They don't.
        """
        for column in (self.image_column, self.text_column):
            if column is not None and column not in present:
                raise RequestError(f"There is no column {column!r} among {', '.join(present)}")
        lost = [column for column in self.columns.values() if column in present]
        if lost:
            raise RequestError(
                f"There are columns named {', '.join(lost)} already. Drop or rename them, or "
                "pass a prefix= for the new ones."
            )

    def client(self) -> MoondreamClient:
        """Return a worker's client, which takes what it isn't given from its environment."""
        return self._client()

    def _client(self, **other: Any) -> MoondreamClient:
        options = {k: v for k, v in self.options.items() if k in _CLIENT_OPTIONS}
        options["max_connections"] = self.connections
        rate_limit = options.get("rate_limit")
        if rate_limit is not None and isinstance(rate_limit, (int, float)):
            options["rate_limit"] = rate_limit / self.workers
        return MoondreamClient(self.api_key, **(options | other))

    async def ask(self, client: MoondreamClient, image: Any, text: Any) -> dict[str, Any]:
        """Return the columns of one row.

        Raises:
            MoondreamError: There is no answer.
        """
        arguments = self.arguments
        if self.text_column is not None:
            arguments[_SKILLS[self.skill].text or ""] = text
        result = await getattr(client, self.skill)(_picture(image), **arguments)
        return self._named({field: _plain(result, field) for field in self.columns})

    def failed(self, error: MoondreamError) -> dict[str, Any]:
        """Return the columns of a row that came to nothing."""
        return self._named({"error_type": type(error).__name__, "error_message": str(error)})

    def _named(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {column: fields.get(field) for field, column in self.columns.items()}


_CLIENT_OPTIONS = frozenset(
    {
        "endpoint",
        "model",
        "timeout",
        "max_retries",
        "max_connections",
        "rate_limit",
        "proxy",
        "max_pixels",
        "insecure_hosts",
    }
)


class Asker:
    """Carries a job out, with a client on an event loop of its own.

    That loop runs in a thread. The loops of libraries for tables won't do: they stand
    still while the library reads and writes, for minutes where what follows is slow,
    and answers that wait meanwhile would run out of time.

    A pickle of it is a new one with the same job. Thread and client are made when the
    first row comes, so that a process may be forked until then.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._closed = False
        self._open: tuple[BlockingPortal, _Desk] | None = None
        self._stack = ExitStack()

    def __reduce__(self) -> tuple[Any, ...]:
        return Asker, (self._job,)

    async def ask(self, rows: Sequence[Callable[[], tuple[Any, Any]]]) -> list[dict[str, Any]]:
        """Ask about rows, all at once, and return their columns in the same order.

        It may be called from any loop. Each row is a function that gives the picture
        and the text; it is called in a worker thread when the row's turn has come, so
        that no more pictures are in memory than requests are open. Cancelling it
        drops the requests.

        Raises:
            AuthenticationError: The server refuses the key. Nothing more is asked.
            ClientClosedError: It was closed before or meanwhile.
        """
        portal, desk = self.start()
        answers = []
        for answer in await asyncio.wrap_future(portal.start_task_soon(desk.answer, rows)):
            if isinstance(answer, AuthenticationError):
                # It comes as a value, and goes as a copy: an error that is kept, by the desk
                # or by the portal, keeps all the frames that it went through.
                raise copy(answer)
            answers.append(answer)
        return answers

    async def ask_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Ask about one row, as `ask` does."""
        self._job.check_columns(tuple(row))
        return (await self.ask([partial(self._read, row)]))[0]

    def _read(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        text = None if self._job.text_column is None else row[self._job.text_column]
        return row[self._job.image_column], text

    def start(self) -> tuple[BlockingPortal, _Desk]:
        """Make the thread and the client, if there are none yet.

        Raises:
            RequestError: There is no key for the cloud, say.
            ClientClosedError: It is closed.
        """
        from anyio import Semaphore  # noqa: PLC0415 - not in the process that makes the plan
        from anyio.from_thread import start_blocking_portal  # noqa: PLC0415 - likewise

        with self._lock, ExitStack() as stack:
            if self._closed:
                raise ClientClosedError("The rows' client is closed")
            if self._open is None:
                client = self._job.client()
                portal = stack.enter_context(start_blocking_portal("asyncio", name="moondream"))
                stack.enter_context(portal.wrap_async_context_manager(client))
                places = portal.call(Semaphore, self._job.connections)
                self._open = portal, _Desk(self._job, client, places)
                self._stack = stack.pop_all()
            return self._open

    def close(self) -> None:
        """Close the client, end the thread and wait for that; again, too."""
        with self._lock:
            self._closed = True
            self._open = None
            stack = self._stack.pop_all()
        stack.close()


class _Desk:
    """Where the rows are answered, on the asker's own loop."""

    def __init__(self, job: Job, client: MoondreamClient, places: Semaphore) -> None:
        self._job = job
        self._client = client
        self._places = places  # the client's own would make a long line wait into a timeout
        self._refusal: AuthenticationError | None = None

    async def answer(
        self, rows: Sequence[Callable[[], tuple[Any, Any]]]
    ) -> list[dict[str, Any] | AuthenticationError]:
        return await asyncio.gather(*map(self._answer, rows))

    async def _answer(
        self, row: Callable[[], tuple[Any, Any]]
    ) -> dict[str, Any] | AuthenticationError:
        async with self._places:
            if self._refusal is not None:
                return self._refusal
            try:
                image, text = await _in_thread(row)
                return await self._job.ask(self._client, image, text)
            except AuthenticationError as error:
                self._refusal = copy(error)
                return self._refusal
            except ClientClosedError:
                raise
            except MoondreamError as error:
                return self._job.failed(error)


async def _in_thread(row: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    from anyio.to_thread import run_sync  # noqa: PLC0415 - as above

    try:
        return await run_sync(row)
    except Exception as error:
        # It may be decoded here, by the library that has the row, which raises anything.
        raise ImageError(f"The picture can't be read: {error or type(error).__name__}") from error


def _picture(value: Any) -> Any:
    """Return what a client takes, of what tables hold.

    Raises:
        RequestError: There is no picture, or there are several.
    """
    if isinstance(value, Mapping):  # as Hugging Face stores pictures: either may be None
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ImageError("There is no picture in this row")
    if isinstance(value, (list, tuple)):
        raise ImageError("There is a list in this row and not a picture")
    return value


def _plain(result: Result, field: str) -> Any:
    """Return a field as data that any table can hold."""
    value = result.get(field)
    return value.text if field == "reasoning" and value is not None else value
