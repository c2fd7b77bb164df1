"""OpenTelemetry: a span for each call, and metrics; the extra ``otel``.

::

    from moondream_async.integrations.otel import instrument

    async with md.MoondreamClient() as client:
        instrument(client)

A program started by ``opentelemetry-instrument`` does not need this line: the package has
an entry point, which follows all clients of the program.

A span covers a call over all its attempts. It ends when the answer is read, when the
stream ends, or when the call fails, is cancelled or dropped. Attempts and retries are
events of the span. Names follow OpenTelemetry's semantic conventions for generative AI
(open-telemetry/semantic-conventions-genai, as of October 2026, unstable):
``gen_ai.operation.name`` is the skill, since the conventions prefer a system's own names.
``moondream.outcome`` is how the call ended: ``complete``, ``interrupted``, ``abandoned``,
``cancelled`` or ``failed``; ``interrupted`` and ``failed`` are errors.

No prompt, answer or picture is recorded, unless ``capture_content=True``.
"""

from __future__ import annotations

import json
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from opentelemetry import metrics, propagate, trace
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

from moondream_async._call.report import CallStart, Kind, Probe
from moondream_async._call.session import Session, new_session_listeners
from moondream_async._version import __version__
from moondream_async.errors import APIStatusError
from moondream_async.types import CallEvent

if TYPE_CHECKING:
    from moondream_async import MoondreamClient

NAME = "moondream_async"
PROVIDER = "moondream"
_SETTINGS = ("temperature", "top_p", "max_tokens", "max_completion_tokens")
_ENDED_BADLY = ("interrupted", "failed")

# The buckets that the conventions advise, in seconds.
_DURATIONS = [0.01 * 2**power for power in range(14)]
_CHUNK_TIMES = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]
_HISTOGRAMS = (
    ("duration", "Duration of calls, retries included", _DURATIONS),
    (
        "time_to_first_chunk",
        "From the sending of a request to the first piece of its stream",
        _CHUNK_TIMES,
    ),
    (
        "time_per_output_chunk",
        "Between two pieces; those that arrive together share the time",
        _CHUNK_TIMES,
    ),
)
_GAUGES = (
    ("open_streams", "{stream}", "Streams and plain calls that hold a connection slot"),
    ("waiting_calls", "{call}", "Calls that wait for a connection slot"),
    ("pooled_connections", "{connection}", "Connections that are open and idle"),
)


def instrument(
    client: MoondreamClient,
    *,
    capture_content: bool = False,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> Callable[[], None]:
    """Follow the calls of a client, and of the clients that its `with_options` returns.

    Args:
        client: The client; calls under way are not followed.
        capture_content: Whether questions, messages and answers become attributes of spans:
            ``gen_ai.input.messages`` and ``gen_ai.output.messages``. Pictures never do.
        tracer_provider: The provider for spans; None is the program's own.
        meter_provider: The provider for metrics; None is the program's own.

    Returns:
        A function that ends the instrumentation. Calls under way are followed to their end.
    """
    instrumentation = _Instrumentation(capture_content, tracer_provider, meter_provider)
    return instrumentation.follow(client._caller.session)  # noqa: SLF001 - one package


class MoondreamInstrumentor(BaseInstrumentor):  # type: ignore[misc]
    """Follows all clients of a program; for ``opentelemetry-instrument``.

    A program can call ``MoondreamInstrumentor().instrument(capture_content=…,
    tracer_provider=…, meter_provider=…)``; `uninstrument` ends the instrumentation.
    """

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return the packages to be instrumented: none but this one, which is installed."""
        return ()

    def _instrument(self, **options: Any) -> None:
        instrumentation = _Instrumentation(
            options.get("capture_content", False),
            options.get("tracer_provider"),
            options.get("meter_provider"),
        )
        stops: weakref.WeakKeyDictionary[Session, Callable[[], None]] = weakref.WeakKeyDictionary()

        def follow(session: Session) -> None:
            stops[session] = instrumentation.follow(session)

        new_session_listeners.append(follow)
        self._follow, self._stops = follow, stops

    def _uninstrument(self, **_: Any) -> None:
        new_session_listeners.remove(self._follow)
        for stop in self._stops.values():
            stop()


class _Instrumentation:
    """The tracer and the instruments, for all followed sessions."""

    def __init__(
        self,
        capture_content: bool,  # noqa: FBT001 - private
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        self.capture_content = capture_content
        self.tracer: Tracer = trace.get_tracer(NAME, __version__, tracer_provider)
        meter = metrics.get_meter(NAME, __version__, meter_provider)
        self.duration, self.first_chunk, self.per_chunk = (
            meter.create_histogram(
                f"gen_ai.client.inference.{name}",
                unit="s",
                description=description,
                explicit_bucket_boundaries_advisory=buckets,
            )
            for name, description, buckets in _HISTOGRAMS
        )
        self.tokens = {
            kind: meter.create_counter(
                f"gen_ai.client.inference.usage.{kind}_tokens",
                unit="{token}",
                description=f"Tokens of {kind}",
            )
            for kind in ("input", "output")
        }
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        for name, unit, description in _GAUGES:
            meter.create_observable_gauge(
                f"moondream.client.{name}",
                callbacks=[partial(self._observe, name)],
                unit=unit,
                description=description,
            )

    def _observe(self, name: str, _: CallbackOptions) -> Iterable[Observation]:
        totals: Counter[str] = Counter()
        for session in list(self._sessions):
            totals[session.endpoint] += getattr(session.stats(), name)
        return [Observation(total, _server(endpoint)) for endpoint, total in totals.items()]

    def follow(self, session: Session) -> Callable[[], None]:
        """Follow the calls of a session; return a function that ends this."""

        def start(call: CallStart) -> Probe:
            return _Call(self, call)

        session.instruments += (start,)
        self._sessions.add(session)
        followed = weakref.ref(session)  # so that `stop` keeps no client alive

        def stop() -> None:
            session = followed()
            if session is not None:
                session.instruments = tuple(one for one in session.instruments if one is not start)
                self._sessions.discard(session)

        return stop


class _Call:
    """Follows one call."""

    __slots__ = (
        "_attributes",
        "_instrumentation",
        "_is_skill",
        "_last_chunk",
        "_span",
        "wants_answer",
    )

    def __init__(self, instrumentation: _Instrumentation, call: CallStart) -> None:
        request = call.request
        payload = request.payload
        model = payload.get("model")
        self._instrumentation = instrumentation
        self._is_skill = request.skill is not None
        self._last_chunk: float | None = None
        self._attributes: dict[str, Any] = dict(_server(call.endpoint))
        if request.skill is None:
            name = f"{request.method} /{request.path.strip('/').split('/')[0].partition('?')[0]}"
            if request.elsewhere:
                name = request.method
        else:
            name = request.skill if model is None else f"{request.skill} {model}"
            self._attributes["gen_ai.operation.name"] = request.skill
            self._attributes["gen_ai.provider.name"] = PROVIDER
            if model is not None:
                self._attributes["gen_ai.request.model"] = model
        span = instrumentation.tracer.start_span(
            name, kind=SpanKind.CLIENT, attributes=self._attributes
        )
        self._span: Span = span
        self.wants_answer = span.is_recording() and instrumentation.capture_content
        if span.is_recording() and self._is_skill:
            if request.stream:
                span.set_attribute("gen_ai.request.stream", value=True)
            for key, value in _settings(payload).items():
                span.set_attribute(f"gen_ai.request.{key}", value)
            if self.wants_answer:
                span.set_attribute("gen_ai.input.messages", _input(payload))

    def headers(self) -> Mapping[str, str]:
        """Return the trace context, for the next attempt."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self._span))
        return carrier

    def chunks(self, count: int) -> None:
        """Measure the time since the last pieces."""
        if not self._span.is_recording():
            return
        now = time.perf_counter()
        if self._last_chunk is not None:
            seconds = (now - self._last_chunk) / count
            for _ in range(count):
                self._instrumentation.per_chunk.record(seconds, self._attributes)
        self._last_chunk = now

    def answer(self, answer: str | Mapping[str, Any]) -> None:
        """Record the answer, before its end is reported."""
        text = answer if isinstance(answer, str) else json.dumps(answer, default=str)
        message = {"role": "assistant", "parts": [{"type": "text", "content": text}]}
        self._span.set_attribute("gen_ai.output.messages", json.dumps([message]))

    def report(self, kind: Kind, event: CallEvent) -> None:
        """Record an event that hooks of this kind get."""
        if kind == "end":
            self._ended(event)
        elif self._span.is_recording():
            about: dict[str, Any] = {"attempt": event.attempt}
            if event.error is not None:
                about["error.type"] = _error_type(event.error)
            if event.delay is not None:
                about["delay"] = event.delay
            self._span.add_event("attempt" if kind == "request" else kind, about)

    def _ended(self, event: CallEvent) -> None:
        has_failed = event.outcome in _ENDED_BADLY
        if has_failed and event.error is not None:
            self._attributes["error.type"] = _error_type(event.error)
        span = self._span
        if span.is_recording():
            for name, value in (
                ("moondream.call_id", event.call_id),
                ("moondream.outcome", event.outcome),
                ("gen_ai.response.id", event.request_id),
                ("gen_ai.response.time_to_first_chunk", event.ttft),
                ("gen_ai.usage.input_tokens", event.input_tokens),
                ("gen_ai.usage.output_tokens", event.output_tokens),
                ("error.type", self._attributes.get("error.type")),
            ):
                if value is not None:
                    span.set_attribute(name, value)
            # The conventions' reason for an answer that began and was cut off is "error".
            had_begun = event.ttft is not None or event.outcome == "interrupted"
            is_cut = had_begun and event.outcome != "complete"
            reason = event.finish_reason or ("error" if is_cut else None)
            if reason is not None and self._is_skill:
                span.set_attribute("gen_ai.response.finish_reasons", [reason])
            if has_failed:
                span.set_status(Status(StatusCode.ERROR, str(event.error or "")[:200] or None))
        span.end()
        if self._is_skill:
            self._measure(event)

    def _measure(self, event: CallEvent) -> None:
        it, attributes = self._instrumentation, self._attributes
        context = trace.set_span_in_context(self._span)  # for exemplars
        it.duration.record(event.seconds, attributes, context)
        if event.ttft is not None:
            it.first_chunk.record(event.ttft, attributes, context)
        for kind, count in (("input", event.input_tokens), ("output", event.output_tokens)):
            if count is not None:
                it.tokens[kind].add(count, attributes, context)


@lru_cache(maxsize=64)
def _server(endpoint: str) -> Mapping[str, Any]:
    parts = urlsplit(endpoint)
    attributes: dict[str, Any] = {"server.address": parts.hostname or ""}
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if port is not None:
        attributes["server.port"] = port
    return attributes


def _error_type(error: BaseException) -> str:
    if isinstance(error, APIStatusError) and error.status >= 400:
        return str(error.status)
    return type(error).__name__


def _settings(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling settings of a request, under the names of the conventions."""
    given = payload.get("settings")
    places = [payload, given] if isinstance(given, Mapping) else [payload]
    found = {
        name: place[name]
        for place in places
        for name in _SETTINGS
        if isinstance(place.get(name), (int, float)) and not isinstance(place.get(name), bool)
    }
    if "max_completion_tokens" in found:
        found["max_tokens"] = found.pop("max_completion_tokens")
    return found


def _input(payload: Mapping[str, Any]) -> str:
    """Return the question or the messages in the conventions' format; pictures as a mark alone."""
    messages = payload.get("messages")
    if messages is None:
        said = payload.get("question") or payload.get("object") or payload.get("length")
        parts = [{"type": "text", "content": str(said)}] if said is not None else []
        if "image_url" in payload:
            parts.append({"type": "image"})
        return json.dumps([{"role": "user", "parts": parts}])
    return json.dumps(
        [{"role": str(each.get("role")), "parts": _parts(each.get("content"))} for each in messages]
    )


def _parts(content: Any) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "content": content}]
    return [
        {"type": "text", "content": str(part["text"])}
        if part.get("type") == "text"
        else {"type": "image"}
        for part in content or ()
    ]
