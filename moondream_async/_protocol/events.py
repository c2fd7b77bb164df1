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
all that is ever sent, go round both, in one call to the JSON decoder; whenever
a block is not surely of that kind, it takes the other way. Both give the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from moondream_async._sse import ServerSentEvent, SSEParser
from moondream_async.errors import (
    StreamError,
    StreamInterruptedError,
    StreamProtocolError,
    StreamServerError,
)
from moondream_async.types import (
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
from .requests import Skill

MAX_EVENT_BYTES = 16 * 1024 * 1024

_DISGUISED_ERRORS = frozenset(
    {
        # The old local server says so in the answer's text, and nowhere else.
        "An error occurred during caption generation.",
        "An error occurred during query processing.",
    }
)


class PlainChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chunk event with nothing in it but these; read straight off the wire."""

    chunk: str
    type: Literal["path_delta"] | UnsetType = UNSET
    completed: bool | UnsetType = UNSET
    request_id: str | UnsetType = UNSET
    token_index: int | UnsetType = UNSET

    def public(self) -> ChunkEvent:
        """Return the same as the type that callers see."""
        return ChunkEvent(chunk=self.chunk, raw=msgspec.to_builtins(self))


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str
    role: str | UnsetType = UNSET


class _Choice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _Delta
    index: int | UnsetType = UNSET
    finish_reason: UnsetType | None = UNSET
    logprobs: UnsetType | None = UNSET


class PlainChatChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chunk event of a chat with nothing in it but these; read straight off the wire."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1, max_length=1)]
    id: str | UnsetType = UNSET
    object: str | UnsetType = UNSET
    created: int | UnsetType = UNSET
    model: str | UnsetType = UNSET

    @property
    def chunk(self) -> str:
        """The text, where `PlainChunk` has it."""
        return self.choices[0].delta.content

    @property
    def request_id(self) -> str | UnsetType:
        """The id, under the name that `PlainChunk` has for it."""
        return self.id

    def public(self) -> ChunkEvent:
        """Return the same as the type that callers see."""
        return ChunkEvent(chunk=self.chunk, raw=msgspec.to_builtins(self))


Event = PlainChunk | PlainChatChunk | StreamEvent
"""What `AnswerDecoder` gives: `chunk` is "" where an event adds no text."""


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

    _plain: ClassVar[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(PlainChunk)

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
        self._parser = SSEParser(max_event_bytes=max_event_bytes, complete=_is_whole_event)
        self._plain_lines = self._plain.decode_lines
        self._tail = bytearray()  # of a line whose end has not come, kept from the parser
        self._has_text = False
        self._ended_early = False
        self._untouched = True  # the parser has seen nothing, so it still expects the start

    def fresh(self) -> AnswerDecoder:
        """Return a decoder for another try at the same answer."""
        return type(self)(self._skill, secret=self.secret, max_event_bytes=self._max_event_bytes)

    @property
    def done(self) -> bool:
        """Whether nothing that still comes can matter."""
        return self.completed or self.failure is not None

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes of the body; return the events that they complete."""
        if self.done:
            return []
        if self._untouched or self._parser.idle:
            events = self._feed_plain(data)
            if events is not None:
                return events
            data = bytes(self._tail + data)
            self._tail = bytearray()
        return self._feed_any(data)

    def end(self) -> list[Event]:
        """Take the end of the body; return the events that only it completes.

        A last line without its line end counts if it is a whole event. If the end
        marker has not come, `failure` is set.
        """
        if self.done:
            return []
        events = self._feed_any(bytes(self._tail + b"\n"))
        self._tail = bytearray()
        if not self.done:
            self._ended_early = True
            self.failure = functools.partial(
                StreamInterruptedError, "The stream ended before the answer was complete"
            )
        return events

    def body(self, data: bytes) -> list[Event]:
        """Take a plain JSON answer that came where a stream was asked for, as one event.

        Raises:
            APIStatusError: It says that it is an error, or is no answer.
        """
        result = read_result(self._skill, decode_json(data))
        self._note(result.raw)
        self.request_id = result.request_id
        self.completed = True
        return [FinalEvent(chunk=self._text_of(result), raw=result.raw)]

    def _text_of(self, result: Result) -> str:
        text: str = result[ANSWER_KEY[self._skill]]
        return text

    # -- the short way ------------------------------------------------------------

    def _feed_plain(self, data: bytes) -> list[Event] | None:
        """Decode a block of plain chunk events; None if it has to take the other way."""
        # A carriage return ends a line too, and one event over the limit is not to pass.
        if b"\r" in data or len(self._tail) + len(data) > self._max_event_bytes:
            return None
        cut = data.rfind(b"\n") + 1
        if not cut:
            self._tail += data
            return []
        block = bytes(self._tail + data[:cut]) if self._tail else data[:cut]
        events = self._decode_plain(block)
        if events is None:
            return None
        self._parser.skip_start()
        self._tail = bytearray(data[cut:])
        for event in reversed(events):
            if event.request_id:
                self.request_id = event.request_id
                break
        self._has_text = self._has_text or any(event.chunk for event in events)
        return events  # type: ignore[return-value] # a list of one member of the union

    def _decode_plain(self, block: bytes) -> list[PlainChunk | PlainChatChunk] | None:
        """Decode ``data: {...}`` lines, each followed by a blank line or none of them.

        The lines are stripped down to newline-delimited JSON. That is sound only if
        each JSON value is one line's whole data: so every line break must stand
        between ``}`` and ``data: {``, where no JSON value can go on from one line to
        the next, and there must be as many values as lines.
        """
        if not block.startswith(b"data: {") or b"true" in block:
            return None
        if block.endswith(b"}\n\n"):
            lines = block[6:].replace(b"}\n\ndata: {", b"}\n{")
            count = (len(block) - 6 - len(lines)) // 7 + 1
            breaks = count + 1
        elif block.endswith(b"}\n"):
            lines = block[6:].replace(b"}\ndata: {", b"}\n{")
            count = (len(block) - 6 - len(lines)) // 6 + 1
            breaks = count
        else:
            return None
        if lines.count(b"\n") != breaks:
            return None
        try:
            events: list[PlainChunk | PlainChatChunk] = self._plain_lines(lines)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None  # not plain, or not JSON; the long way knows which
        return events if len(events) == count else None

    # -- the long way -------------------------------------------------------------

    def _feed_any(self, data: bytes) -> list[Event]:
        self._untouched = False
        try:
            parsed = self._parser.feed(data)
        except StreamProtocolError as error:
            self.failure = functools.partial(StreamProtocolError, str(error))
            return []
        events: list[Event] = []
        for event in parsed:
            events += self._decode(event)
            if self.done:
                break
        return events

    def _decode(self, event: ServerSentEvent) -> list[Event]:
        if event.data.strip() == "[DONE]":
            return self._finish({}, "")
        raw = _json_or_text(event.data)
        if event.event == "error" or (isinstance(raw, dict) and raw.get("error")):
            return self._fail_with(_json_or_text(self._redact(event.data)))
        if not isinstance(raw, dict):
            return self._refuse("an event that is no JSON object", event.data)
        return self._decode_object(raw, event)

    def _decode_object(self, raw: dict[str, Any], event: ServerSentEvent) -> list[Event]:
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

    def _refuse(self, what: str, text: str) -> list[Event]:
        message = f"The server sent {what}: {self._redact(text):.200}"
        self.failure = functools.partial(StreamProtocolError, message)
        return []

    def _redact(self, text: str) -> str:
        """Take the key out of what goes into an error. An answer is never touched."""
        return text.replace(self.secret, "***") if self.secret else text

    def _finish(self, raw: dict[str, Any], chunk: str) -> list[Event]:
        if chunk in _DISGUISED_ERRORS:
            return self._fail_with({**raw, "error": chunk})
        if not chunk and not self._has_text:
            # Nothing was streamed: then, and only then, the whole answer is news.
            whole = raw.get(ANSWER_KEY.get(self._skill, ""))
            chunk = whole if isinstance(whole, str) else ""
        self.completed = True
        return [FinalEvent(chunk=chunk, raw=raw)]

    def _fail_with(self, raw: Any) -> list[Event]:
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

    _plain: ClassVar[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(PlainChatChunk)

    def end(self) -> list[Event]:
        """Take the end of the body; a `finish_reason` also says that the answer is complete."""
        events = super().end()
        if self.finish_reason is not None and self._ended_early:
            self.failure = None
            self.completed = True
        return events

    def _text_of(self, result: Result) -> str:
        assert isinstance(result, ChatResult)  # noqa: S101 - for the type checker
        self.finish_reason = result.finish_reason
        self.reasoning = result.reasoning
        return result.message.content

    def _decode_object(self, raw: dict[str, Any], event: ServerSentEvent) -> list[Event]:
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
        events: list[Event] = []
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
