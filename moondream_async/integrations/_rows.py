"""One question about every row of a table: the common part of the libraries for tables.

A `Job` holds the skill with its arguments, the columns to read and the options of the
client. It is checked when it is made, and sent to workers as data. In a worker an
`Asker` answers rows: each becomes a mapping of new columns, with the error as a value
if the row failed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, cast

import msgspec

from moondream_async._checks import check_count
from moondream_async._client import MoondreamClient, hidden_address
from moondream_async._protocol.secret import Secret, hidden
from moondream_async.bulk.items import FIELDS
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
"""The default of requests that a worker has open at once: at the cloud's 10 requests a
second and three seconds an answer, 30 are under way."""

Row = Callable[[], tuple[Any, Any]]

PLACES = {"objects": ("x_min", "y_min", "x_max", "y_max"), "points": ("x", "y")}
"""The fields of the answers that are lists of places."""


def kept(api_key: object, options: Mapping[str, Any]) -> tuple[Secret | None, dict[str, Any]]:
    """Return a key and options that show no secret, before an error can show them."""
    secret = options.keys() & {"endpoint", "proxy"}
    return hidden(api_key), {**options, **{name: hidden_address(options[name]) for name in secret}}


class Options(TypedDict, total=False):
    """Arguments of the skill for all rows, and of `MoondreamClient` in each worker."""

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


_SKILL_OPTIONS = {"length", "question", "reasoning", "object", "settings"}
_CLIENT_OPTIONS = Options.__annotations__.keys() - _SKILL_OPTIONS


_ANSWERS = {"caption": "caption", "query": "answer", "detect": "objects", "point": "points"}
"""The skills, each with the field of its answer, which is the name of its column."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The question about every row, and the client that asks it.

    Raises:
        RequestError: An argument is invalid. No I/O was done.
    """

    skill: str
    image_column: str = "image"
    text_column: str | None = None
    prefix: str = ""
    workers: int = 1
    """The number of clients, which share the rate limit."""
    api_key: Secret | None = None
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.skill not in _ANSWERS:
            raise RequestError(f"skill must be one of {', '.join(_ANSWERS)}, not {self.skill!r}")
        for name in ("image_column", "text_column"):
            column = getattr(self, name)
            if not (isinstance(column, str) and column) and (column or name == "image_column"):
                raise RequestError(f"{name} must be the name of a column, not {column!r}")
        if not isinstance(self.prefix, str):
            raise RequestError(f"prefix must be a string, not {self.prefix!r}")
        check_count("the number of workers", self.workers)
        self._check_arguments()
        # A worker's environment may name another endpoint: here any address will do that
        # a key may be sent to.
        self._client(endpoint=self.options.get("endpoint") or "http://localhost/v1")

    def _check_arguments(self) -> None:
        make, defaults = FIELDS[self.skill]
        known = {*defaults, "settings", *_CLIENT_OPTIONS} - {"stream", "spatial_refs"}
        unknown = sorted(self.options.keys() - known)
        if unknown:
            raise RequestError(f"{self.skill} takes no {', '.join(unknown)}")
        given, text = self.arguments, self._text
        if self.text_column is not None:
            if text is None or text in given:
                other = text or "text of any kind"
                raise RequestError(f"text_column: {self.skill} has its {other} otherwise")
            given[text] = "in each row"
        elif text is not None and text not in given:
            raise RequestError(f"{self.skill} needs {text}= or text_column=")
        arguments = {**defaults, "settings": None, "model": self.options.get("model"), **given}
        make(b"in each row", **arguments)

    @property
    def _text(self) -> str | None:
        """The argument that a column may give for each row."""
        return next(
            (name for name in ("question", "object") if name in FIELDS[self.skill][1]), None
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The skill's arguments for every row."""
        return {k: v for k, v in self.options.items() if k not in _CLIENT_OPTIONS}

    @property
    def connections(self) -> int:
        """How many requests a worker has open at once."""
        return cast("int", self.options.get("max_connections", CONNECTIONS))

    @property
    def columns(self) -> dict[str, str]:
        """The names of the new columns, by the fields that they hold."""
        answers = [_ANSWERS[self.skill]]
        if self.options.get("reasoning"):
            answers.append("reasoning")
        fields = (*answers, "request_id", "finish_reason", "error_type", "error_message")
        return {field: self.prefix + field for field in fields}

    def check_columns(self, present: Sequence[str]) -> None:
        """Check that the columns to read are there, and those to add are not.

        Raises:
            RequestError: A column is missing, or would be overwritten.
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
        """Return a worker's client; missing options come from the worker's environment."""
        return self._client()

    def _client(self, **other: Any) -> MoondreamClient:
        options = {k: v for k, v in self.options.items() if k in _CLIENT_OPTIONS}
        options["max_connections"] = self.connections
        rate_limit = options.get("rate_limit")
        if rate_limit is not None and isinstance(rate_limit, (int, float)):
            options["rate_limit"] = rate_limit / self.workers
        return MoondreamClient(self.api_key, **(options | other))

    async def ask(self, client: MoondreamClient, image: Any, text: Any) -> dict[str, Any]:
        """Return the new columns of one row.

        Raises:
            MoondreamError: The call or the picture failed.
        """
        arguments = self.arguments
        if self.text_column is not None:
            arguments[self._text or ""] = text
        result: Result = await getattr(client, self.skill)(_picture(image), **arguments)
        fields: dict[str, Any] = dict(result)
        if "reasoning" in fields:
            fields["reasoning"] = fields["reasoning"].text
        return self._named(fields)

    def failed(self, error: MoondreamError) -> dict[str, Any]:
        """Return the new columns of a row that failed."""
        return self._named({"error_type": type(error).__name__, "error_message": str(error)})

    def _named(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {column: fields.get(field) for field, column in self.columns.items()}


class Asker:
    """Answers rows for a job, with a client on an event loop of its own.

    The loop runs in a thread. The loops of libraries for tables are not used: they stop
    while the library reads and writes, for minutes if the next step is slow, and calls
    on them would time out.

    A pickle of an asker is a new one with the same job. Thread and client are made for
    the first row; until then the process may be forked.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._closed = False
        self._portal: BlockingPortal | None = None
        self._client: MoondreamClient
        self._slots: Semaphore  # rows that wait for a slot of the client's would time out
        self._refusal: AuthenticationError | None = None
        self._stack = ExitStack()

    def __reduce__(self) -> tuple[Any, ...]:
        return Asker, (self._job,)

    async def ask(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Answer rows, all at once, and return their columns in the same order.

        Any loop may call this. A row is a function that returns the picture and the text.
        A worker thread calls the function when a connection is free, so that memory holds
        no more pictures than requests are open. Cancelling drops the requests.

        Raises:
            AuthenticationError: The server refuses the key. No later row is sent.
            ClientClosedError: The asker is closed before or meanwhile.
        """
        portal = self.start()
        answers = []
        for answer in await asyncio.wrap_future(portal.start_task_soon(self._answer_all, rows)):
            if isinstance(answer, AuthenticationError):
                # The error comes as a value, and goes as a copy: the original is kept here
                # and by the portal, and would keep all the frames that it went through.
                raise copy(answer)
            answers.append(answer)
        return answers

    async def ask_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one row, as `ask` does."""
        self._job.check_columns(tuple(row))
        return (await self.ask([partial(self._read, row)]))[0]

    def _read(self, row: Mapping[str, Any]) -> tuple[Any, Any]:
        text = None if self._job.text_column is None else row[self._job.text_column]
        return row[self._job.image_column], text

    def start(self) -> BlockingPortal:
        """Make the thread and the client, if there are none yet.

        Raises:
            RequestError: The client can't be made, for example without a key.
            ClientClosedError: The asker is closed.
        """
        from anyio import Semaphore  # noqa: PLC0415 - not in the process that makes the plan
        from anyio.from_thread import start_blocking_portal  # noqa: PLC0415 - likewise

        with self._lock, ExitStack() as stack:
            if self._closed:
                raise ClientClosedError("The rows' client is closed")
            if self._portal is None:
                client = self._job.client()
                portal = stack.enter_context(start_blocking_portal("asyncio", name="moondream"))
                stack.enter_context(portal.wrap_async_context_manager(client))
                self._slots = portal.call(Semaphore, self._job.connections)
                self._client, self._portal = client, portal
                self._stack = stack.pop_all()
            return self._portal

    def close(self) -> None:
        """Close the client and wait for the end of the thread. May be called twice."""
        with self._lock:
            self._closed = True
            self._portal = None
            stack = self._stack.pop_all()
        stack.close()

    async def _answer_all(self, rows: Sequence[Row]) -> list[dict[str, Any] | AuthenticationError]:
        return await asyncio.gather(*map(self._answer, rows))

    async def _answer(self, row: Row) -> dict[str, Any] | AuthenticationError:
        async with self._slots:
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


async def _in_thread(row: Row) -> tuple[Any, Any]:
    from anyio.to_thread import run_sync  # noqa: PLC0415 - as above

    try:
        return await run_sync(row)
    except Exception as error:
        # The library of the row may decode the picture here, and raise any exception.
        raise ImageError(f"The picture can't be read: {error or type(error).__name__}") from error


def _picture(value: Any) -> Any:
    """Return the picture in a cell of a table, as a client takes pictures.

    Raises:
        ImageError: The cell is empty, or holds a list.
    """
    if isinstance(value, Mapping):  # as Hugging Face stores pictures: either may be None
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None:
        raise ImageError("There is no picture in this row")
    if isinstance(value, (list, tuple)):
        raise ImageError("There is a list in this row and not a picture")
    return value
