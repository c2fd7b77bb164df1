"""Feeding a decoder, and looking at all that comes out of it."""

import json
from typing import Any, NamedTuple

from moondream_async._protocol.decoders import decoder_for
from moondream_async.results import Reasoning, Region, Usage


class Known(NamedTuple):
    """What a decoder knows beside the events that it has given."""

    completed: bool
    request_id: str | None
    finish_reason: str | None
    metrics: dict[str, Any] | None
    reasoning: Reasoning | None
    usage: Usage | None
    bbox: Region | None
    path: str | None
    parse_error: str | None
    failure: tuple[type, dict[str, Any]] | None


NOTHING = Known(*[None] * len(Known._fields))._replace(completed=False)


def known(decoder):
    failure = None
    if decoder.failure is not None:
        error = decoder.failure(partial="so far")
        failure = (type(error), {"message": error.message, **vars(error)})
    names = Known._fields[:-1]
    return Known(*[getattr(decoder, name) for name in names], failure=failure)


def steps(decoder, packets):
    """Feed `packets` and the end; return what each of them gave."""
    taken = [([*decoder.feed(packet)], known(decoder)) for packet in packets]
    return [*taken, ([*decoder.end()], known(decoder))]


def decode(*packets, skill="caption", **options):
    """Feed `packets` and the end; return all events, and what is known at last."""
    decoder = decoder_for(skill)
    if options:
        decoder = type(decoder)(skill, **options)
    taken = steps(decoder, packets)
    return [event for events, _ in taken for event in events], taken[-1][1]


def text(events):
    return "".join(event.chunk for event in events)


def sse(*bodies, end=b"\n\n"):
    return b"".join(
        b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + end
        for body in bodies
    )


def byte_by_byte(stream):
    return [stream[i : i + 1] for i in range(len(stream))]


CUTS = ["whole", "byte by byte", "by 7", "by 100", "by 101", "by lines"]


def cuts(stream):
    """`stream` in packets, once for each of `CUTS`."""
    yield [stream]
    yield byte_by_byte(stream)
    for size in (7, 100, 101):
        yield [stream[i : i + size] for i in range(0, len(stream), size)]
    yield stream.splitlines(keepends=True)


def decode_cut(stream, **options):
    """Decode a stream, which gives the same however it is cut."""
    whole, *others = (decode(*packets, **options) for packets in cuts(stream))
    for cut, other in zip(CUTS[1:], others, strict=True):
        assert other == whole, cut
    return whole


def chat(**delta):
    """A piece of a chat, in the form of OpenAI's protocol."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
