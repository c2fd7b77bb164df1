"""How fast is `moondream_async._protocol.sse`, and does its time grow with the input and no faster?

::

    python benchmarks/bench_sse.py
    pip install httpx httpx-sse  # for the comparison; without them those lines are left out

First, one event of 1, 2, 4 and 8 MB in packets of 100 bytes: twice the input must
take twice the time. Then 50,000 small events in packets of 64 KiB, as they come
when a server is faster than its reader: events only, and with their JSON decoded.
The floor is what no parser can beat: ``split`` at the blank lines, and nothing
looked at. Last the same events with one packet each, as a model writes them.

Every contender runs in a process of its own, 15 times; shown are the best and how
much longer the worst took, in seconds of the processor, so that what else the
machine does counts for less. What this leaves out: the network, and the client's
way round the parser for plain events.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import random
import subprocess
import sys
import time

RUNS = 15
EVENTS = 50_000
PACKET = 65_536  # the read buffer of aiohttp, by default
HAVE_HTTPX_SSE = all(map(importlib.util.find_spec, ("httpx", "httpx_sse")))
WORDS = ["a", "grey", "heron", "stands", "in", "shallow", "water", "café", "茶", "one leg raised"]


def in_packets(stream, size):
    return [stream[i : i + size] for i in range(0, len(stream), size)]


def small_events():
    """Return the wire form of `EVENTS` chunks, the same at every run."""
    choice = random.Random(20).choice
    return [
        f'data: {{"chunk": "{choice(WORDS)} {choice(WORDS)} ", "completed": false}}\n\n'.encode()
        for _ in range(EVENTS)
    ]


def large_event(megabytes):
    words = random.Random(21).choices(WORDS, k=1000)
    data = " ".join(words).encode() * (megabytes * 250)
    return b"data: " + data[: megabytes * 1_000_000] + b"\n\n"


def parse(packets):
    from moondream_async._protocol.sse import SSEParser

    parser = SSEParser()
    for packet in packets:
        yield from parser.feed(packet)


def parse_httpx_sse(packets):
    import httpx
    import httpx_sse

    headers = {"content-type": "text/event-stream; charset=utf-8"}
    response = httpx.Response(200, headers=headers, content=iter(packets))
    return httpx_sse.EventSource(response).iter_sse()


def split(packets):
    for block in b"".join(packets).split(b"\n\n"):
        if block:
            yield block[6:]


def count(events):
    return sum(1 for _ in events)


def decoded(payloads):
    from msgspec.json import decode

    for payload in payloads:
        decode(payload)
        yield payload


def data_of(events):
    return (event.data for event in events)


# name: (the packets, what is done with them); each gives the number of its events
LARGE = {
    f"{size} MB": (
        lambda size=size: in_packets(large_event(size), 100),
        lambda packets: count(parse(packets)),
    )
    for size in (1, 2, 4, 8)
}


def coalesced():
    return in_packets(b"".join(small_events()), PACKET)


COALESCED = {
    "moondream_async": (coalesced, lambda packets: count(parse(packets))),
    "httpx-sse": (coalesced, lambda packets: count(parse_httpx_sse(packets))),
    "floor: split": (coalesced, lambda packets: count(split(packets))),
    "moondream_async + json": (coalesced, lambda packets: count(decoded(data_of(parse(packets))))),
    "httpx-sse + json": (
        coalesced,
        lambda packets: count(decoded(data_of(parse_httpx_sse(packets)))),
    ),
    "floor: split + json": (coalesced, lambda packets: count(decoded(split(packets)))),
}
SINGLE = {
    "moondream_async, 1 by 1": (small_events, lambda packets: count(parse(packets))),
    "httpx-sse, 1 by 1": (small_events, lambda packets: count(parse_httpx_sse(packets))),
}
CONTENDERS = LARGE | COALESCED | SINGLE


def time_one(name):
    """Print the number of events, and the seconds that each run took."""
    make, work = CONTENDERS[name]
    packets = make()
    events = work(packets)  # not counted: imports, and caches to be filled
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        work(packets)
        times.append(time.process_time() - start)
    print(json.dumps([events, times]))


def in_a_process(name):
    command = [sys.executable, __file__, "--only", name]
    events, times = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return events, min(times), max(times) / min(times) - 1


def versions():
    names = ["msgspec", "httpx-sse", "httpx"]
    found = [f"Python {platform.python_version()}"]
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main():
    print(versions())
    print("\none event in packets of 100 bytes")
    before = None
    for name in LARGE:
        _, best, spread = in_a_process(name)
        nanoseconds = best * 1000 / int(name.split()[0])
        ratio = "" if before is None else f"  {best / before:.2f} times the one before"
        print(
            f"  {name:5} {best * 1000:7.1f} ms  +{spread:4.0%}  {nanoseconds:5.1f} ns/byte{ratio}"
        )
        before = best
    for title, group in (
        (f"{EVENTS:,} small events in packets of 64 KiB", COALESCED),
        (f"{EVENTS:,} small events, one a packet", SINGLE),
    ):
        print(f"\n{title}")
        for name in group:
            if name.startswith("httpx-sse") and not HAVE_HTTPX_SSE:
                continue
            events, best, spread = in_a_process(name)
            assert events == EVENTS, f"{name} gave {events} events"
            print(f"  {name:24} {events / best:10,.0f} events/s  +{spread:4.0%}")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--only", choices=CONTENDERS, help="time this one, in this process")
    only = arguments.parse_args().only
    if only is None:
        main()
    else:
        time_one(only)
