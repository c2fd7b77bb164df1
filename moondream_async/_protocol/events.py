"""A streamed answer: bytes in, typed events out, whichever server sends them.

=========  ========  ===============  =============  ======================
server     text key  end marker       text in final  besides
=========  ========  ===============  =============  ======================
cloud      chunk     completed: true  no             request_id, org_id
kestrel    chunk     completed: true  yes            the whole answer again
Station    chunk     completed: true  no             a stats event
old local  chunk     completed: true  error text     --
segment    chunk     type: final      no             bbox, the refined path
chat       delta     [DONE]           no             reasoning, usage
=========  ========  ===============  =============  ======================

There are two ways through. `SSEParser` and a look at each event know every
case. Blocks of nothing but plain ``data: {"chunk": ...}`` lines, which is nearly
all that is ever sent, go round both (`plain`); whenever a block is not surely of
that kind, it takes the other way. Both give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec

from moondream_async.errors import (
    StreamError,
    StreamInterruptedError,
    StreamProtocolError,
    StreamServerError,
)
from moondream_async.results import (
    BboxEvent,
    ChatResult,
    ChunkEvent,
    FinalEvent,
    MetricsEvent,
    Reasoning,
    ReasoningEvent,
    Region,
    Result,
    StreamEvent,
    UnknownEvent,
    Usage,
)

from .answers import (
    ANSWER_KEY,
    decode_json,
    decode_reasoning,
    decode_region,
    decode_usage,
    describe,
    find_metrics,
    find_reasoning,
    read_result,
    show,
    to_id,
)
from .plain import NOTHING, Block, PlainChatChunk, PlainChunk, PlainLines
from .requests import Skill
from .sse import ServerSentEvent, SSEParser

MAX_EVENT_BYTES = 16 * 1024 * 1024

_LAST_EVENTS = 3
"""What is not plain at the end of an answer: chat has a finish reason, the usage and [DONE]."""

_DISGUISED_ERRORS = frozenset(
    {
        # The old local server says so in the answer's text, and nowhere else.
        "An error occurred during caption generation.",
        "An error occurred during query processing.",
    }
)


class AnswerDecoder:
    r"""One streamed caption or answer.

    `feed` it what arrives and call `end` at the end of the body. What is known
    beside the text stands in the attributes. A fault does not take away the
    events before it: these are returned, and `failure` says what came after.

    >>> decoder = AnswerDecoder("caption")
    >>> [event.chunk for event in decoder.feed(b'data: {"chunk": "a cat"}\n\n')]
    ['a cat']
    >>> [event.chunk for event in decoder.feed(b'data: {"completed": true}\n\n')]
    ['']
    >>> decoder.completed
    True
    """

    _plain_kind: ClassVar[tuple[bytes, msgspec.json.Decoder[Any]]] = (
        b'"chunk":',
        msgspec.json.Decoder(PlainChunk),
    )

    def __init__(
        self, skill: Skill, *, secret: str = "", max_event_bytes: int = MAX_EVENT_BYTES
    ) -> None:
        self.request_id: str | None = None
        self.finish_reason: str | None = None
        self.metrics: dict[str, Any] | None = None
        self.reasoning: Reasoning | None = None
        self.usage: Usage | None = None
        self.bbox: Region | None = None
        self.path: str | None = None
        self.parse_error: str | None = None
        self.completed = False
        self.failure: Callable[..., StreamError] | None = None
        """Makes the error to raise once the events are used up; takes ``partial=``."""
        self._skill: Skill = skill
        self.secret = secret
        """The API key; an error that quotes it is not to pass it on."""
        self._max_event_bytes = max_event_bytes
        self._parser: SSEParser | None = None  # until something is not plain
        self._plain = PlainLines(*self._plain_kind)
        self._tail = bytearray()  # of a line whose end has not come, kept from the parser
        self._has_text = False
        self._ended_early = False
        self._has_begun = False
        self._is_between = True  # two events: the parser has nothing that waits for more

    def fresh(self) -> AnswerDecoder:
        """Return a decoder for another try at the same answer."""
        return type(self)(self._skill, secret=self.secret, max_event_bytes=self._max_event_bytes)

    @property
    def done(self) -> bool:
        """Whether nothing that still comes can matter."""
        return self.completed or self.failure is not None

    def feed(self, data: bytes) -> Block:
        """Take the next bytes of the body; return the events that they complete."""
        if self.completed or self.failure is not None:
            return NOTHING
        if self._is_between:
            # One event, as a model writes them: all that follows is for many, and would
            # take half as long again.
            template = self._plain.template
            if template is not None and not self._tail and len(data) <= self._max_event_bytes:
                block = template.read_one(data)
                if block is not None:
                    self.request_id = template.request_id or self.request_id
                    self._has_text = self._has_text or block.texts[0] != ""
                    return block
            block = self._feed_plain(data)
            if block is not None:
                return block
            data = bytes(self._tail + data)
            self._tail.clear()
            return self._feed_mixed(data)
        return self._feed_long(data)

    def end(self) -> Block:
        """Take the end of the body; return the events that only it completes.

        A last line without its line end counts if it is a whole event. If the end
        marker has not come, `failure` is set.
        """
        if self.done:
            return NOTHING
        block = self._feed_any(bytes(self._tail + b"\n"))
        self._tail.clear()
        if not self.done:
            self._ended_early = True
            self.failure = functools.partial(
                StreamInterruptedError, "The stream ended before the answer was complete"
            )
        return block

    def body(self, data: bytes) -> Block:
        """Take a plain JSON answer that came where a stream was asked for, as one event.

        Raises:
            APIStatusError: It says that it is an error, or is no answer.
        """
        result = read_result(self._skill, decode_json(data))
        self._note(result.raw)
        self.request_id = result.request_id
        self.completed = True
        return Block.of([FinalEvent(chunk=self._text_of(result), raw=result.raw)])

    def _text_of(self, result: Result) -> str:
        text: str = result[ANSWER_KEY[self._skill]]
        return text

    # -- the short way ------------------------------------------------------------

    def _feed_plain(self, data: bytes) -> Block | None:
        """Decode a block of plain chunk events; None if it has to take the other way."""
        # A carriage return ends a line too, and one event over the limit is not to pass.
        tail = self._tail
        if b"\r" in data or len(tail) + len(data) > self._max_event_bytes:
            return None
        cut = data.rfind(b"\n") + 1
        if not cut:
            tail += data
            return NOTHING
        lines = data[:cut]
        if tail:
            lines = bytes(tail + lines)
        block = self._plain.decode(lines)
        if block is None:
            return None
        self._has_begun = True
        if tail or cut < len(data):
            tail[:] = data[cut:]
        self.request_id = self._plain.request_id or self.request_id
        self._has_text = self._has_text or any(block.texts)
        return block

    def _feed_mixed(self, data: bytes) -> Block:
        """Decode a block whose last events may be all that is not plain, as at an answer's end."""
        end = len(data)
        for _ in range(_LAST_EVENTS):
            end = data.rfind(b"\ndata: ", 0, end) + 1
            if not end:
                break
            block = self._feed_plain(data[:end])
            if block is not None:
                return block + self._feed_long(data[end:])
        return self._feed_long(data)

    # -- the long way -------------------------------------------------------------

    def _feed_long(self, data: bytes) -> Block:
        """Keep a line that has not ended from the parser, so that the short way stays open."""
        cut = data.rfind(b"\n") + 1
        block, rest = self._feed_any(data[:cut]), data[cut:]
        if self.done:
            return block
        if self._is_between and b"\r" not in rest and len(rest) <= self._max_event_bytes:
            self._tail += rest
            return block
        return block + self._feed_any(rest)

    def _feed_any(self, data: bytes) -> Block:
        parser = self._parser
        if parser is None:
            self._parser = parser = SSEParser(
                max_event_bytes=self._max_event_bytes, complete=_is_whole_event
            )
        if self._has_begun:
            parser.skip_start()
        try:
            parsed = parser.feed(data)
        except StreamProtocolError as error:
            self.failure = functools.partial(StreamProtocolError, str(error))
            return NOTHING
        self._is_between = parser.idle
        events: list[StreamEvent] = []
        for event in parsed:
            events += self._decode(event)
            if self.done:
                break
        return Block.of(events)

    def _decode(self, event: ServerSentEvent) -> list[StreamEvent]:
        if event.data.strip() == "[DONE]":
            return self._finish({}, "")
        raw = _json_or_text(event.data)
        if event.event == "error" or (isinstance(raw, dict) and raw.get("error")):
            return self._fail_with(_json_or_text(self._redact(event.data)))
        if not isinstance(raw, dict):
            return self._refuse("an event that is no JSON object", event.data)
        return self._decode_object(raw, event)

    def _decode_object(self, raw: dict[str, Any], event: ServerSentEvent) -> list[StreamEvent]:
        self._note(raw)
        chunk = raw.get("chunk")
        if chunk is None:
            chunk = raw.get("text")
        if chunk is not None and not isinstance(chunk, str):
            return self._refuse("a chunk that is no text", show(chunk))
        kind = raw.get("type")
        if raw.get("completed") is True or kind == "final":
            return self._finish(raw, chunk or "")
        if chunk is not None or "chunk" in raw:
            self._has_text = self._has_text or bool(chunk)
            return [ChunkEvent(chunk=chunk or "", raw=raw)]
        if kind == "bbox" and self.bbox is not None:
            return [BboxEvent(bbox=self.bbox, raw=raw)]
        if isinstance(raw.get("stats"), dict):
            return [MetricsEvent(metrics=raw["stats"], raw=raw)]
        return [UnknownEvent(event=kind if isinstance(kind, str) else event.event, raw=raw)]

    def _refuse(self, what: str, text: str) -> list[StreamEvent]:
        message = f"The server sent {what}: {self._redact(text):.200}"
        self.failure = functools.partial(StreamProtocolError, message)
        return []

    def _redact(self, text: str) -> str:
        """Take the key out of what goes into an error. An answer is never touched."""
        return text.replace(self.secret, "***") if self.secret else text

    def _finish(self, raw: dict[str, Any], chunk: str) -> list[StreamEvent]:
        if chunk in _DISGUISED_ERRORS:
            return self._fail_with({**raw, "error": chunk})
        if not chunk and not self._has_text:
            # Nothing was streamed: then, and only then, the whole answer is news.
            whole = raw.get(ANSWER_KEY.get(self._skill, ""))
            chunk = whole if isinstance(whole, str) else ""
        self.completed = True
        return [FinalEvent(chunk=chunk, raw=raw)]

    def _fail_with(self, raw: Any) -> list[StreamEvent]:
        message, fields = describe(raw)
        self.failure = functools.partial(
            StreamServerError,
            message or "The server reported an error",
            type=fields.get("type"),
            code=fields.get("code"),
            body=raw,
        )
        return []

    def _note(self, raw: dict[str, Any]) -> None:
        """Keep what an event says beside its text."""
        self.request_id = to_id(raw.get("request_id")) or self.request_id
        self.finish_reason = to_id(raw.get("finish_reason")) or self.finish_reason
        self.metrics = find_metrics(raw) or self.metrics
        self.reasoning = decode_reasoning(raw.get("reasoning")) or self.reasoning
        self.usage = decode_usage(raw.get("usage")) or self.usage
        self.bbox = decode_region(raw.get("bbox")) or self.bbox
        self.path = to_id(raw.get("path")) or self.path
        self.parse_error = to_id(raw.get("parse_error")) or self.parse_error


class ChatDecoder(AnswerDecoder):
    """One streamed turn of a chat, in the form of OpenAI's protocol."""

    _plain_kind = b'"content":', msgspec.json.Decoder(PlainChatChunk)

    def end(self) -> Block:
        """Take the end of the body; a `finish_reason` also says that the answer is complete."""
        block = super().end()
        if self.finish_reason is not None and self._ended_early:
            self.failure = None
            self.completed = True
        return block

    def _text_of(self, result: Result) -> str:
        assert isinstance(result, ChatResult)  # noqa: S101 - for the type checker
        self.finish_reason = result.finish_reason
        self.reasoning = result.reasoning
        return result.message.content

    def _decode_object(self, raw: dict[str, Any], event: ServerSentEvent) -> list[StreamEvent]:
        self.request_id = to_id(raw.get("id")) or self.request_id
        self.usage = decode_usage(raw.get("usage")) or self.usage
        self.metrics = find_metrics(raw) or self.metrics
        choices = raw.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            if isinstance(raw.get("usage"), dict):
                return [MetricsEvent(metrics=raw["usage"], raw=raw)]
            return [UnknownEvent(event=event.event, raw=raw)]
        self.finish_reason = to_id(choice.get("finish_reason")) or self.finish_reason
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return [UnknownEvent(event=event.event, raw=raw)]
        chunk = delta.get("content")
        if chunk is not None and not isinstance(chunk, str):
            return self._refuse("a chunk that is no text", show(chunk))
        events: list[StreamEvent] = []
        piece = find_reasoning(delta)
        if piece is not None:
            before = self.reasoning or Reasoning("")
            self.reasoning = Reasoning(before.text + piece.text, before.grounding + piece.grounding)
            events.append(ReasoningEvent(text=piece.text, raw=raw))
        if chunk or piece is None:
            self._has_text = self._has_text or bool(chunk)
            events.append(ChunkEvent(chunk=chunk or "", raw=raw))
        return events


def decoder_for(skill: Skill, *, secret: str = "") -> AnswerDecoder:
    """Return the decoder for a streamed answer of a skill."""
    return (ChatDecoder if skill == "chat" else AnswerDecoder)(skill, secret=secret)


def _json_or_text(data: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return data


def _is_whole_event(line: str) -> bool:
    """Say whether one data line is an event by itself, so that no blank line need follow.

    The cloud's documentation prints its events without blank lines. A line that
    is a JSON object can't be the first of several: nothing may follow one.
    """
    if line == "[DONE]":
        return True
    return line.startswith("{") and isinstance(_json_or_text(line), dict)
