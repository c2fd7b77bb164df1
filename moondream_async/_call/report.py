"""The reports of a call: to hooks, to probes (as of tracing), and to the log."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

from moondream_async._protocol.answers import find_metrics, to_id
from moondream_async.errors import (
    ClientClosedError,
    MoondreamError,
    StreamInterruptedError,
    StreamStalledError,
)
from moondream_async.types import CallEvent, Outcome

if TYPE_CHECKING:
    from moondream_async._protocol.requests import Request
    from moondream_async._transport.bodies import Body
    from moondream_async.types import Hooks

log = logging.getLogger("moondream_async")


def _log_as_the_environment_says() -> None:
    """Show the log on stderr where MOONDREAM_LOG is ``debug`` or ``info``."""
    level = os.environ.get("MOONDREAM_LOG", "").strip().upper()
    if level in ("DEBUG", "INFO"):
        logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
        log.setLevel(level)


_log_as_the_environment_says()

Kind = Literal["request", "first_chunk", "retry", "end"]


class CallStart(NamedTuple):
    """A call that is about to begin; its `Instrument` runs in the context of the caller."""

    call_id: str
    endpoint: str
    request: Request


class Probe(Protocol):
    """Follows one call, as for tracing."""

    def chunks(self, count: int) -> None:
        """So many pieces of a stream's text have arrived together."""

    @property
    def wants_answer(self) -> bool:
        """Whether `answer` is to be called."""

    def answer(self, answer: str | Mapping[str, Any]) -> None:
        """Take the text of a stream, or a whole answer, just before its end is reported."""

    def headers(self) -> Mapping[str, str]:
        """Return more headers for the next attempt, as ``traceparent``."""

    def report(self, kind: Kind, event: CallEvent) -> None:
        """Take the event that a hook of this kind gets, in the loop of the call."""


Instrument = Callable[[CallStart], Probe | None]
"""Called at the beginning of a call; returns a probe for it, or None."""


class Report:
    """Reports one call, from its first attempt to its end."""

    __slots__ = (
        "__weakref__",
        "_began",
        "_body",
        "_call_id",
        "_endpoint",
        "_hooks",
        "_is_over",
        "_loop",
        "_probes",
        "_received",
        "_request",
        "_sent",
        "attempt",
    )

    def __init__(
        self,
        request: Request,
        endpoint: str,
        hooks: Hooks,
        instruments: tuple[Instrument, ...],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.attempt = 0
        """The number of the attempt, from 1."""
        self._sent = 0  # bytes
        self._received = 0  # bytes, of the answers before this one
        self._body: Body | None = None
        self._request = request
        self._endpoint = _origin(request.path) if request.elsewhere else endpoint
        self._hooks = hooks
        self._loop = loop
        self._call_id = ""
        self._is_over = False
        self._began = time.monotonic()
        self._probes: list[Probe] = []
        if instruments:
            start = CallStart(self.call_id, self._endpoint, request)
            probes = (instrument(start) for instrument in instruments)
            self._probes = [probe for probe in probes if probe is not None]

    @property
    def call_id(self) -> str:
        """The id of the call, the same for all its attempts; made when it is first needed."""
        if not self._call_id:
            self._call_id = os.urandom(8).hex()
        return self._call_id

    @property
    def is_heard(self) -> bool:
        """Whether a hook or a probe gets the first chunk or the end of the call."""
        hooks = self._hooks
        return bool(self._probes) or hooks.end is not None or hooks.first_chunk is not None

    @property
    def wants_answer(self) -> bool:
        """Whether a probe needs the answer."""
        return any(probe.wants_answer for probe in self._probes)

    @property
    def is_traced(self) -> bool:
        """Whether `headers` may return any."""
        return bool(self._probes)

    def headers(self) -> dict[str, str]:
        """Return the headers that the probes add to an attempt."""
        return {name: value for probe in self._probes for name, value in probe.headers().items()}

    def notify(self, kind: Kind, **what: Any) -> None:
        """Report one event to the probes and the hook of its kind."""
        hook = getattr(self._hooks, kind)
        if hook is None and not self._probes:
            return
        model = self._request.payload.get("model")
        event = CallEvent(
            call_id=self.call_id,
            skill=self._request.skill,
            model=model if isinstance(model, str) else None,
            endpoint=self._endpoint,
            stream=self._request.stream,
            attempt=self.attempt,
            seconds=time.monotonic() - self._began,  # the loop may have ended, so not its clock
            **what,
        )
        listeners = [probe.report for probe in self._probes]
        for listener in listeners:
            _guarded(kind, listener, kind, event)
        if hook is not None:
            _guarded(kind, hook, event)

    def began(self, size: int) -> None:
        """Report that a request of `size` bytes is about to be sent."""
        self.attempt += 1
        self._sent += size
        if self._probes or self._hooks.request is not None:
            self.notify("request")

    def responded(self, body: Body, seconds: float) -> None:
        """Note an answer, and log one line for it."""
        if self._body is not None:
            self._received += self._body.received
        self._body = body
        if log.isEnabledFor(logging.INFO):
            log.info(
                "%s %s: %d in %.3f s (call %s, attempt %d)",
                self._request.method,
                self._request.path.partition("?")[0],  # the query may hold a signature
                body.status,
                seconds,
                self.call_id,
                self.attempt,
            )

    def retried(self, delay: float, error: MoondreamError, *, most: int) -> None:
        """Report that another attempt follows."""
        if log.isEnabledFor(logging.DEBUG):
            what = (self.attempt, most, delay, error, self.call_id)
            log.debug("retry %d of %d in %.2f s: %s (call %s)", *what)
        self.notify("retry", delay=delay, error=error)

    # -- what a stream reports --------------------------------------------------------

    def first_chunk(self, request_id: str | None) -> None:
        """Report that the first piece of text has arrived."""
        self.notify("first_chunk", request_id=request_id)

    def chunks(self, texts: Sequence[str]) -> None:
        """Report to the probes how many pieces of text have arrived together."""
        if self._probes:
            count = len(texts) - texts.count("")
            if count:
                for probe in self._probes:
                    probe.chunks(count)

    def ended(
        self,
        *,
        error: BaseException | None = None,
        completed: bool = False,
        request_id: str | None = None,
        finish_reason: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        usage: Any = None,
        ttft: float | None = None,
        answer: str | Mapping[str, Any] | None = None,
    ) -> None:
        """Report, once, that the call is over: in its own loop, from any thread."""
        if self._is_over:
            return
        self._is_over = True
        body, self._body = self._body, None  # its headers may quote the key
        if not self.is_heard:
            return
        if body is not None:
            self._received += body.received
        for probe in self._probes:
            if probe.wants_answer and answer:
                _guarded("end", probe.answer, answer)
        input_tokens, output_tokens = _tokens(metrics, usage)
        what = {
            "error": error,
            "completed": completed,
            "outcome": _outcome(error, completed=completed),
            "request_id": request_id,
            "finish_reason": finish_reason,
            "input_tokens": input_tokens,
            "output_tokens": output_tokens,
            "bytes_sent": self._sent,
            "bytes_received": self._received,
            "ttft": ttft,
        }
        if self._loop.is_running() and self._loop is not _loop_here():
            try:
                self._loop.call_soon_threadsafe(lambda: self.notify("end", **what))
            except RuntimeError:  # the loop was closed meanwhile
                self.notify("end", **what)
        else:
            self.notify("end", **what)

    def answered(self, answer: Any) -> None:
        """Report that the whole answer has arrived."""
        if not self.is_heard:
            self._is_over = True
        elif isinstance(answer, dict) and not hasattr(answer, "finish_reason"):
            self.ended(
                completed=True,
                request_id=to_id(answer.get("request_id")) or to_id(answer.get("id")),
                metrics=find_metrics(answer),
                answer=answer,
            )
        else:
            self.ended(
                completed=True,
                request_id=getattr(answer, "request_id", None),
                finish_reason=getattr(answer, "finish_reason", None),
                metrics=getattr(answer, "metrics", None),
                usage=getattr(answer, "usage", None),
                answer=getattr(answer, "raw", None),
            )


def _guarded(kind: str, listener: Callable[..., object], *arguments: Any) -> None:
    try:
        listener(*arguments)
    except Exception:
        log.exception("A hook for %r failed", kind)


def _outcome(error: BaseException | None, *, completed: bool) -> Outcome:
    if completed:
        return "complete"
    if error is None or isinstance(error, (GeneratorExit, ClientClosedError)):
        return "abandoned"
    if isinstance(error, (StreamInterruptedError, StreamStalledError)):
        return "interrupted"
    if isinstance(error, (MoondreamError, Exception)):
        return "failed"
    return "cancelled"


_MAX_TOKENS = 2**63
"""The limit of counters and columns of 64 bits; a server may send any number."""


def _tokens(metrics: Any, usage: Any) -> tuple[int | None, int | None]:
    """Find the numbers of input and output tokens, under each name that servers use."""
    found: list[int | None] = [None, None]
    for source, names in (
        (metrics, ("input_tokens", "output_tokens")),
        (usage, ("prompt_tokens", "completion_tokens")),
        (metrics, ("prompt_tokens", "tokens")),  # Station's
    ):
        for place, name in enumerate(names):
            value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
            if found[place] is None and type(value) is int and 0 <= value < _MAX_TOKENS:
                found[place] = value
    return found[0], found[1]


def _origin(address: str) -> str:
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def _loop_here() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def drop_frames(error: BaseException | None) -> None:
    """Remove the tracebacks of a kept error: their frames hold pictures and answers."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
