"""The bytes that the server replays, the same at every run, and the text that they say.

A `Plan` is the first part of a URL's path, as in ``/streams=8,events=400/v1/caption``:
so every client can be told by its base URL alone what it is to be sent.
"""

from __future__ import annotations

import functools
import json
import random
from dataclasses import asdict, dataclass

WORDS = ["a", "grey", "heron", "stands", "in", "shallow", "water", "café", "茶", "one leg raised"]
MODEL = "moondream3-preview"
QUESTION = "What is to be seen?"


@dataclass(frozen=True)
class Plan:
    """What one request is answered with."""

    kind: str = "stream"
    """``stream``; ``engine`` for one in the open engine's words; ``first`` for a pause after the
    first packet; ``large`` for one event of `events` bytes; ``call`` for a plain answer;
    ``release`` lets streams with `hold` go on."""
    events: int = 1
    """Events of text in a stream; the end comes on top."""
    per: int = 1
    """Events to a packet."""
    streams: int = 1
    """How many streams wait for each other: the first packets go out when all are there."""
    every_us: int = 0
    """Microseconds from a packet to the next in one stream; 0: all at once."""
    hold: int = 0
    """Whether all wait for a ``release`` after the first packet, and before the end."""

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Return what `str` was made of."""
        values = dict(each.split("=") for each in text.split(","))
        return cls(**{key: value if key == "kind" else int(value) for key, value in values.items()})

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())


@functools.cache
def texts(count: int) -> list[str]:
    """Return the pieces of text of one stream."""
    choice = random.Random(20).choice
    return [f"{choice(WORDS)} {choice(WORDS)} " for _ in range(count)]


@functools.cache
def large_text(size: int) -> str:
    """Return text that takes `size` bytes, all of them ASCII."""
    return " ".join(random.Random(21).choices(WORDS[:7], k=size // 2))[:size]


def expected(plan: Plan) -> str:
    """Return all the text of one stream."""
    return large_text(plan.events) if plan.kind == "large" else "".join(texts(plan.events))


def caption_events(pieces: list[str]) -> list[bytes]:
    """Return the events of a caption, as Moondream Cloud documents them."""
    return [
        *(_event({"chunk": piece, "completed": False}) for piece in pieces),
        _event({"completed": True, "chunk": "", "request_id": "2026-11-23_caption_1"}),
    ]


def engine_events(pieces: list[str]) -> list[bytes]:
    """Return the events of a caption, as the open engine has them: each is numbered."""
    return [
        *(
            _event({"chunk": piece, "completed": False, "token_index": number})
            for number, piece in enumerate(pieces)
        ),
        _event({"completed": True, "chunk": "", "request_id": "42", "finish_reason": "stop"}),
    ]


def chat_events(pieces: list[str]) -> list[bytes]:
    """Return the events of a chat, as OpenAI's API has them."""
    same = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1795392000,
        "model": MODEL,
    }

    def chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(same | {"choices": [choice]})

    return [
        *(chunk({"content": piece}, None) for piece in pieces),
        chunk({}, "stop"),
        b"data: [DONE]\n\n",
    ]


def _event(value: object) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def in_chunks(data: bytes) -> bytes:
    """Return one chunk of a chunked HTTP body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.cache
def packets(plan: Plan, skill: str) -> list[bytes]:
    """Return the body of a stream, cut as it is to be sent; the end is a packet of its own."""
    make = chat_events if skill == "chat" else caption_events
    if plan.kind == "engine":
        make = engine_events
    if plan.kind == "large":
        whole = b"".join(make([expected(plan)]))
        return [in_chunks(whole[i : i + plan.per]) for i in range(0, len(whole), plan.per)] + [END]
    events = make(texts(plan.events))
    body = [
        in_chunks(b"".join(events[i : min(i + plan.per, plan.events)]))
        for i in range(0, plan.events, plan.per)
    ]
    return [*body, in_chunks(b"".join(events[plan.events :])) + END]


END = b"0\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n"
)
ANSWER = json.dumps(
    {"caption": "A grey heron stands in shallow water.", "request_id": "2026-11-23_caption_1"}
).encode()
CHAT_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1795392000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": json.loads(ANSWER)["caption"]},
                "finish_reason": "stop",
            }
        ],
    }
).encode()
ANSWER, CHAT_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    % (len(body), body)
    for body in (ANSWER, CHAT_ANSWER)
)
