"""What does tracing cost a call, and an event of a stream?

::

    python benchmarks/bench_tracing.py

A server of prepared bytes, in a process of its own, answers plain calls, and streams of
200 events that come alone. The client asks without OpenTelemetry, with its spans not
sampled, and with spans and metrics kept in memory, in turns; shown is the processor's time
of the client for each, best and median of the turns, and what tracing adds to none: the median
of the differences and ratios within each turn.

Then one stream that was retried and one that was abandoned are printed as spans.

What this leaves out: what an exporter sends anywhere.
"""

import asyncio
import multiprocessing
import statistics
import time

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

import moondream_async as md
from moondream_async.integrations.otel import instrument
from moondream_async.simulator import Simulator

TURNS = 40
CALLS = 50
STREAMS = 4
EVENTS = 200
IMAGE = md.EncodedImage(b"no picture that anybody looks at", "image/jpeg", 8, 8)
ANSWER = b'{"caption": "ok", "metrics": {"input_tokens": 1, "output_tokens": 1}}'
PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
) + ANSWER
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def in_chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(ready):
    async def answer(reader, writer):
        writer.transport.get_extra_info("socket").setsockopt(6, 1, 1)  # TCP_NODELAY
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if b'"stream":true' not in body:
                writer.write(PLAIN)
                continue
            writer.write(HEAD)
            for _ in range(EVENTS):
                writer.write(in_chunk(b'data: {"chunk": "word ", "completed": false}\n\n'))
                await asyncio.sleep(0)
            writer.write(in_chunk(b'data: {"chunk": "", "completed": true}\n\n') + b"0\r\n\r\n")

    async def handle(reader, writer):
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run_server(ready):
    asyncio.run(serve(ready))


def providers(**options):
    exporter = InMemorySpanExporter()
    tracer_provider = TracerProvider(**options)
    tracer_provider.add_span_processor(SimpleSpanProcessor(exporter))
    reader = InMemoryMetricReader()
    return exporter, {
        "tracer_provider": tracer_provider,
        "meter_provider": MeterProvider([reader]),
    }


async def measure(endpoint, way):
    """Return seconds of the processor for a call, and for an event."""
    async with md.MoondreamClient(endpoint=endpoint) as client:
        if way != "off":
            _, given = providers(**({"sampler": ALWAYS_OFF} if way == "unsampled" else {}))
            instrument(client, **given)
        await client.caption(IMAGE)
        begin = time.process_time()
        for _ in range(CALLS):
            await client.caption(IMAGE)
        calls = time.process_time() - begin
        begin = time.process_time()
        for _ in range(STREAMS):
            await (await client.caption(IMAGE, stream=True)).text()
        streams = time.process_time() - begin
    call = calls / CALLS
    return call, (streams / STREAMS - call) / EVENTS


async def compare(endpoint):
    ways = ("off", "unsampled", "on")
    found = {way: [] for way in ways}
    for _ in range(TURNS):
        for way in ways:
            found[way].append(await measure(endpoint, way))
    print("microseconds of the client's processor: best (median)")
    print(f"{'':10} {'a call':>18} {'an event':>18}")
    for way in ways:
        shown = [
            f"{min(each) * 1e6:.1f} ({statistics.median(each) * 1e6:.1f})"
            for each in zip(*found[way], strict=True)
        ]
        print(f"{way:10} {shown[0]:>18} {shown[1]:>18}")
    for way in ways[1:]:
        turns = list(zip(found[way], found["off"], strict=True))
        added = [statistics.median(a[i] - b[i] for a, b in turns) * 1e6 for i in range(2)]
        ratios = [statistics.median(a[i] / b[i] for a, b in turns) for i in range(2)]
        print(
            f"{way}: {added[0]:+.1f} a call ({ratios[0]:.2f} times), "
            f"{added[1]:+.2f} an event ({ratios[1]:.2f} times)"
        )


async def show():
    exporter, given = providers()
    async with (
        Simulator(rate=0) as simulator,
        md.MoondreamClient(endpoint=simulator.endpoint) as client,
    ):
        instrument(client, **given)
        simulator.faults.append("status=503,retry_after=0.1")
        await (await client.caption(md.SAMPLE_IMAGE, stream=True)).text()
        simulator.faults.append("stall=3")
        async with client.query(md.SAMPLE_IMAGE, "How many?", stream=True) as stream:
            await anext(stream)
    for span in exporter.get_finished_spans():
        print(span.to_json())


def main():
    ours, its = multiprocessing.Pipe()
    server = multiprocessing.Process(target=run_server, args=(its,), daemon=True)
    server.start()
    asyncio.run(compare(f"http://127.0.0.1:{ours.recv()}/v1"))
    server.terminate()
    asyncio.run(show())


if __name__ == "__main__":
    main()
