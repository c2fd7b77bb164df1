"""Spans and metrics of OpenTelemetry, in its own in-memory exporters."""

import asyncio
import json
from collections import Counter

import aiohttp
import pytest
from backends import NEEDS, uvicorn

import moondream_async as md
from moondream_async.simulator import SAMPLE_IMAGE, Simulator

needs = pytest.importorskip
needs("opentelemetry.sdk", reason="needs: python -m pip install '.[test]'")

from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import SimpleSpanProcessor  # noqa: E402
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF  # noqa: E402
from opentelemetry.trace import SpanKind, StatusCode  # noqa: E402

from moondream_async.integrations.otel import MoondreamInstrumentor, instrument  # noqa: E402

SECRETS = ("How many people", "A bright", "base64")


class Telemetry:
    """Providers of a test's own, and what came out of them."""

    def __init__(self, **options):
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(**options)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader])

    @property
    def providers(self):
        return {"tracer_provider": self.tracer_provider, "meter_provider": self.meter_provider}

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    @property
    def span(self):
        [span] = self.spans
        return span

    def metrics(self):
        """The points of each metric, by its name."""
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {
            metric.name: list(metric.data.data_points)
            for scope in scopes
            for metric in scope.metrics
        }


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def dialect():
    return "kestrel"  # it counts tokens


@pytest.fixture
async def client(simulator, telemetry):
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        stop = instrument(client, **telemetry.providers)
        yield client
        stop()


def events_of(span):
    return [event.name for event in span.events]


async def test_stream_is_one_span_that_ends_with_it(client, simulator, telemetry, photo):
    stream = await client.query(photo, "How many people?", stream=True, model="m")
    assert telemetry.spans == ()
    await stream.text()

    span = telemetry.span
    assert (span.name, span.kind) == ("query m", SpanKind.CLIENT)
    assert span.status.status_code is StatusCode.UNSET
    assert events_of(span) == ["attempt", "first_chunk"]
    attributes = dict(span.attributes)
    assert attributes.pop("gen_ai.response.time_to_first_chunk") == stream.ttft
    assert attributes.pop("moondream.call_id")
    assert attributes == {
        "gen_ai.operation.name": "query",
        "gen_ai.provider.name": "moondream",
        "gen_ai.request.model": "m",
        "gen_ai.request.stream": True,
        "gen_ai.response.id": stream.request_id,
        "gen_ai.response.finish_reasons": (stream.finish_reason,),
        "gen_ai.usage.input_tokens": stream.metrics["input_tokens"],
        "gen_ai.usage.output_tokens": stream.metrics["output_tokens"],
        "moondream.outcome": "complete",
        "server.address": "127.0.0.1",
        "server.port": int(simulator.endpoint.split(":")[2].removesuffix("/v1")),
    }
    assert not [secret for secret in SECRETS if secret in span.to_json()]


async def test_settings_stand_in_the_span(client, telemetry, photo):
    settings = {"temperature": 0.5, "top_p": 0.25, "max_tokens": 7}
    await client.caption(photo, settings=settings)
    async with (
        Simulator(rate=0) as cloud,
        md.MoondreamClient("key", endpoint=cloud.endpoint) as chatting,
    ):
        instrument(chatting, **telemetry.providers)
        await chatting.chat([{"role": "user", "content": "Hi"}], settings=settings)

    for span in telemetry.spans:
        wanted = {f"gen_ai.request.{name}": value for name, value in settings.items()}
        assert {name: span.attributes[name] for name in wanted} == wanted
    assert [span.name for span in telemetry.spans] == ["caption", "chat moondream3-preview"]


async def test_tokens_are_counted(client, telemetry, photo):
    answers = [await client.caption(photo), await client.caption(photo)]

    for kind in ("input", "output"):
        [point] = telemetry.metrics()[f"gen_ai.client.inference.usage.{kind}_tokens"]
        assert point.value == sum(answer.metrics[f"{kind}_tokens"] for answer in answers) > 0


async def test_stream_whose_reader_is_cancelled_is_no_failed_span(client, simulator, telemetry):
    simulator.faults.append("stall=2")
    stream = await client.caption(SAMPLE_IMAGE, stream=True)
    await anext(stream)
    reader = asyncio.create_task(stream.text())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader

    span = telemetry.span
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["moondream.outcome"] == "cancelled"
    assert "error.type" not in span.attributes


async def test_calls_that_are_no_skill_have_spans_without_ids(telemetry):
    async with Simulator() as cloud, md.MoondreamClient("key", endpoint=cloud.endpoint) as client:
        instrument(client, **telemetry.providers)
        await client.models()

    assert telemetry.span.name == "GET /models"
    assert "gen_ai.operation.name" not in telemetry.span.attributes


async def test_content_is_captured_only_when_asked_for(simulator, client, telemetry, photo):
    """`client` is instrumented, and was not asked to."""
    await client.query(photo, "How many people?")
    await (await client.caption(photo, stream=True)).text()
    assert not [name for span in telemetry.spans for name in span.attributes if "messages" in name]

    async with md.MoondreamClient(endpoint=simulator.endpoint) as other:
        instrument(other, capture_content=True, **telemetry.providers)
        plain = await other.query(photo, "How many people?")
        said = await (await other.caption(photo, stream=True)).text()
    *_, span, streamed = telemetry.spans
    [answer] = json.loads(streamed.attributes["gen_ai.output.messages"])
    assert answer["parts"][0]["content"] == said
    [asked] = json.loads(span.attributes["gen_ai.input.messages"])
    text = {"type": "text", "content": "How many people?"}
    assert asked == {"role": "user", "parts": [text, {"type": "image"}]}
    assert plain.answer in span.attributes["gen_ai.output.messages"]
    assert "base64" not in span.to_json()


async def test_time_between_chunks_is_measured(client, simulator, telemetry, photo):
    held = simulator.script.caption(["A red", " circle", "."], hold_after=1)
    stream = await client.caption(photo, stream=True)
    assert await anext(stream) == "A red"
    held.release()
    await stream.text()

    [point] = telemetry.metrics()["gen_ai.client.inference.time_per_output_chunk"]
    assert point.count == 2


async def test_gauges_say_what_is_open(client, simulator, telemetry, photo):
    simulator.faults.append("stall=2")
    async with client.caption(photo, stream=True):
        gauges = telemetry.metrics()
        assert [
            gauges[f"moondream.client.{name}"][0].value
            for name in ("open_streams", "waiting_calls", "pooled_connections")
        ] == [1, 0, 0]
    await client.caption(photo)
    [pooled] = telemetry.metrics()["moondream.client.pooled_connections"]
    assert pooled.value == 1


async def test_span_that_is_not_sampled_passes_the_trace_on(simulator, photo):
    telemetry = Telemetry(sampler=ALWAYS_OFF)
    async with md.MoondreamClient(endpoint=simulator.endpoint) as client:
        instrument(client, capture_content=True, **telemetry.providers)
        await (await client.caption(photo, stream=True)).text()

    assert telemetry.spans == ()
    flags = int(simulator.requests[0].headers["traceparent"][-2:], 16)
    assert not flags & 1
    assert "gen_ai.client.inference.duration" in telemetry.metrics()


async def test_what_ends_the_instrumentation_ends_it(client, simulator, photo):
    one_client, every_client = Telemetry(), Telemetry()
    instrument(client, **one_client.providers)()
    await client.caption(photo)
    assert one_client.spans == ()

    instrumentor = MoondreamInstrumentor()
    instrumentor.instrument(**every_client.providers)
    try:
        async with md.MoondreamClient(endpoint=simulator.endpoint) as another:
            await another.caption(photo)
            instrumentor.uninstrument()
            await another.caption(photo)
    finally:
        instrumentor.uninstrument()
    assert every_client.span.name == "caption"


def test_programs_that_are_instrumented_from_outside_find_the_entry_point():
    from importlib.metadata import entry_points

    [point] = entry_points(group="opentelemetry_instrumentor", name="moondream_async")
    assert point.load() is MoondreamInstrumentor


# -- through a backend ---------------------------------------------------------------------


@pytest.fixture
def ended():
    """What the hook for ends was told."""
    return []


@pytest.fixture
async def backend(simulator, telemetry, ended):
    """A client in a FastAPI program under uvicorn, and a browser that asks it."""
    fastapi = needs("fastapi", reason=NEEDS)
    instrumentation = needs("opentelemetry.instrumentation.fastapi", reason=NEEDS)
    hooks = md.Hooks(end=ended.append)
    client = md.MoondreamClient(endpoint=simulator.endpoint, hooks=hooks)
    instrument(client, **telemetry.providers)
    app = fastapi.FastAPI()

    async def say():
        return await (await client.caption(SAMPLE_IMAGE, stream=True)).text()

    @app.get("/ask")
    async def ask():
        stream = await client.caption(SAMPLE_IMAGE, stream=True)
        return fastapi.responses.StreamingResponse(stream.sse(), media_type="text/event-stream")

    @app.get("/plain")
    async def plain():
        return await client.caption(SAMPLE_IMAGE)

    @app.get("/drop")
    async def drop():
        stream = await client.caption(SAMPLE_IMAGE, stream=True)
        await anext(stream)
        with pytest.warns(ResourceWarning):
            del stream

    @app.get("/bulk")
    async def bulk():
        run = client.bulk([SAMPLE_IMAGE] * 20, "caption", max_retries=30)
        return [done.ok async for done in run]

    @app.get("/loops")
    async def loops():
        # Each thread is in the context of the request, and has an event loop of its own.
        await asyncio.gather(*[asyncio.to_thread(asyncio.run, say()) for _ in range(4)])

    instrumentation.FastAPIInstrumentor.instrument_app(
        app, tracer_provider=telemetry.tracer_provider
    )
    async with client, uvicorn(app) as address, aiohttp.ClientSession(address) as browser:
        yield browser, client


async def read(browser, client, path):
    async with browser.get(path) as response:
        await response.read()


async def leave(browser, client, path):
    async with browser.get(path) as response:
        await response.content.readany()


async def close_client(browser, client, path):
    async with browser.get(path) as response:
        await response.content.readany()
        await client.aclose()
        await response.read()


WAYS = {  # path, fault, browser, and of the span: outcome, error.type, attempts
    "complete": ("/ask", None, read, "complete", None, 1),
    "cut": ("/ask", "cut=2", read, "interrupted", "StreamInterruptedError", 1),
    "server error": ("/ask", "error_event=2", read, "failed", "StreamServerError", 1),
    "refused": ("/plain", "status=400", read, "failed", "400", 1),
    "retried": ("/ask", "status=503,times=2,retry_after=0", read, "complete", None, 3),
    "429, retried": ("/plain", "status=429,retry_after=0", read, "complete", None, 2),
    "429": ("/plain", "status=429,times=9,retry_after=0", read, "failed", "429", 4),
    "browser gone": ("/ask", "stall=2", leave, "abandoned", None, 1),
    "client closed": ("/ask", "stall=2", close_client, "abandoned", None, 1),
    "dropped": ("/drop", "stall=2", read, "abandoned", None, 1),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_a_call_in_a_request_is_one_span_under_that_of_the_request(
    backend, simulator, telemetry, ended, way
):
    path, fault, act, outcome, error_type, attempts = way
    simulator.faults.extend([fault] * (fault is not None))
    await act(*backend, path)
    server, ours = await spans_of(telemetry, 1)

    [span], [end] = ours, ended
    assert span.parent.span_id == server.context.span_id
    [sent] = {request.headers["traceparent"] for request in simulator.requests}
    context = span.context
    assert sent == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert (span.attributes["moondream.outcome"], end.outcome) == (outcome, outcome)
    assert span.attributes["moondream.call_id"] == end.call_id
    tried = [event for event in events_of(span) if event != "first_chunk"]
    assert tried == ["attempt", *["retry", "attempt"] * (attempts - 1)]
    refused = {event.attributes["error.type"] for event in span.events if event.name == "retry"}
    assert refused <= {"503", "429"}
    assert bool(refused) == (attempts > 1)
    status = StatusCode.UNSET if error_type is None else StatusCode.ERROR
    assert error_of(span) == (status, error_type)
    began = error_type not in ("400", "429")
    reasons = {True: ("stop",), False: ("error",) if began else None}[outcome == "complete"]
    assert span.attributes.get("gen_ai.response.finish_reasons") == reasons
    [point] = telemetry.metrics()["gen_ai.client.inference.duration"]
    assert point.attributes.get("error.type") == error_type


async def test_each_picture_of_a_run_is_a_span(backend, simulator, telemetry, ended):
    simulator.faults.extend(["status=503,times=10,retry_after=0", "status=400,times=3"])
    await read(*backend, "/bulk")
    server, spans = await spans_of(telemetry, 20)

    assert {span.parent.span_id for span in spans} == {server.context.span_id}
    calls = {span.attributes["moondream.call_id"]: span for span in spans}
    assert len(spans) == len(calls) == len(ended) == 20
    assert calls.keys() == {end.call_id for end in ended}
    told = Counter((each.attributes["moondream.outcome"], *error_of(each)) for each in spans)
    assert told == {
        ("complete", StatusCode.UNSET, None): 17,
        ("failed", StatusCode.ERROR, "400"): 3,
    }
    events = [event for span in spans for event in span.events]
    retries = [event.attributes["error.type"] for event in events if event.name == "retry"]
    assert retries == ["503"] * 10
    assert [event.name for event in events].count("attempt") == len(simulator.requests) == 30


def error_of(span):
    return span.status.status_code, span.attributes.get("error.type")


async def test_four_loops_at_once_share_the_parent_and_the_metrics(backend, telemetry, ended):
    await read(*backend, "/loops")
    server, spans = await spans_of(telemetry, 4)

    assert {span.parent.span_id for span in spans} == {server.context.span_id}
    assert len({span.context.span_id for span in spans}) == 4 == len(ended)
    metrics = telemetry.metrics()
    for name in ("duration", "time_to_first_chunk"):
        [point] = metrics[f"gen_ai.client.inference.{name}"]
        assert point.count == 4


async def spans_of(telemetry, count):
    """Return the span of the request, and ours once there are so many."""

    def ours():
        return [span for span in telemetry.spans if span.name == "caption"]

    def servers():
        return [span for span in telemetry.spans if span.kind is SpanKind.SERVER]

    while len(ours()) < count or not servers():
        await asyncio.sleep(0)
    [server] = servers()
    return server, ours()
