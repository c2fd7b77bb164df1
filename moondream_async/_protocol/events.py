"""A streamed answer: bytes in, typed events out, whichever server sends them.

=========  ========  ===============  =============  ======================
server     text key  end marker       text in final  other fields
=========  ========  ===============  =============  ======================
cloud      chunk     completed: true  no             request_id, org_id
kestrel    chunk     completed: true  yes            the whole answer again
Station    chunk     completed: true  no             a stats event
old local  chunk     completed: true  error text     --
segment    chunk     type: final      no             bbox, the refined path
chat       delta     [DONE]           no             reasoning, usage
=========  ========  ===============  =============  ======================

A stream is read line by line. Nearly all lines are ``data: {"chunk": ...}`` with known fields
only: each is decoded once, into a strict type (`chunks`), and whole packets of such lines at
once. A line that does not fit that type is called odd here. The first odd line, and the rest of
its packet, go to `SSEParser`, which knows every rule of the format and hands over the JSON that
it has decoded. Both ways give the same events.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any, ClassVar

import msgspec

from moondream_async.errors import (
    APIStatusError,
    MoondreamError,
    StreamInterruptedError,
    StreamProtocolError,
    StreamServerError,
)
from moondream_async.results import (
    BboxEvent,
    ChunkEvent,
    FinalEvent,
    Grounding,
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
    read_result,
    show,
    to_id,
)
from .chunks import NOTHING, Block, Chunk, Template
from .decoding import FAULTS, LOST, decode, join_halves
from .requests import Skill
from .secret import NOTHING_SECRET, Redactor
from .sse import BOM, ServerSentEvent, SSEParser

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Limit of one event, so as not to block the event loop: far above the largest, masks in base64."""

MAX_ANSWER_CHARACTERS = 64 * 1024 * 1024
"""Limit of an answer's text, and of its reasoning: far above any real answer."""

_OF_EVENTS = frozenset({"chunk", "text", "completed", "type", "token_index", "reasoning_content"})
"""Fields that describe the last event of a stream, and not the answer."""

_DISGUISED_ERRORS = frozenset(
    {
        # The old local server reports an error as the answer's text, and nowhere else.
        "An error occurred during caption generation.",
        "An error occurred during query processing.",
    }
)

_LESSONS = 4
"""How many templates a stream may learn: its first event may differ from all others."""

# Shared by all streams, to save memory: most streams never fill them. Neither is ever changed.
_NO_GROUNDING: list[Grounding] = []
_NO_EVENT: dict[str, Any] = {}

_JSON_START = re.compile(rb"(?:%b)?\s*(?:\{|\Z)" % BOM)


class AnswerDecoder:
    r"""Decodes one streamed caption or answer.

    Call `feed` with the bytes that arrive, and `end` at the end of the body. The attributes
    hold what the server said beside the text. Events that came before a fault are returned,
    and `failure` is set to the fault.

    >>> decoder = AnswerDecoder("caption")
    >>> [event.chunk for event in decoder.feed(b'data: {"chunk": "a cat"}\n\n')]
    ['a cat']
    >>> [event.chunk for event in decoder.feed(b'data: {"completed": true}\n\n')]
    ['']
    >>> decoder.completed
    True
    """

    __slots__ = (
        "_by_line",
        "_ended_early",
        "_grounding",
        "_half",
        "_has_text",
        "_is_between",
        "_last",
        "_lessons",
        "_max_event_bytes",
        "_parser",
        "_skill",
        "_start",
        "_tail",
        "_template",
        "_thought",
        "_thoughts",
        "_whole",
        "bbox",
        "completed",
        "failure",
        "finish_reason",
        "metrics",
        "parse_error",
        "path",
        "request_id",
        "secret",
        "usage",
    )

    _strict: ClassVar[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(Chunk)
    _key: ClassVar[bytes] = b'"chunk":'

    def __init__(
        self,
        skill: Skill,
        *,
        secret: Redactor = NOTHING_SECRET,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        self.request_id: str | None = None
        self.finish_reason: str | None = None
        self.metrics: dict[str, Any] | None = None
        self._thoughts: Reasoning | None = None  # all of the reasoning; None while pieces come
        self._thought: StringIO | None = None  # the pieces of the reasoning so far
        self._grounding: list[Grounding] = _NO_GROUNDING
        self._last: dict[str, Any] = _NO_EVENT
        self._whole: dict[str, Any] | None = None  # the answer, if it came as one JSON body
        self.usage: Usage | None = None
        self.bbox: Region | None = None
        self.path: str | None = None
        self.parse_error: str | None = None
        self.completed = False
        self.failure: Callable[..., MoondreamError] | None = None
        """Makes the error to raise after the last event; takes ``partial=``, the text so far."""
        self._skill: Skill = skill
        self.secret = secret
        """Takes the API key out of an error that quotes it."""
        self._max_event_bytes = max_event_bytes
        # The first bytes, until they show whether the body is a stream or plain JSON.
        self._start: bytearray | None = bytearray()
        self._by_line = False  # whether `_start` and the parser hold no bytes back
        self._tail: bytearray | None = None  # the beginning of a line whose end has not come
        self._parser: SSEParser | None = None  # made for the first odd line
        self._template: Template | None = None
        self._lessons = _LESSONS
        self._has_text = False
        self._half = ""  # the first half of a surrogate pair, if the last chunk ended in one
        self._ended_early = False

    @property
    def done(self) -> bool:
        """Whether the rest of the body can be ignored."""
        return self.completed or self.failure is not None

    def feed(self, data: bytes) -> Block:
        """Take the next bytes of the body; return the events that they complete."""
        if not self._by_line or self._tail is not None or b"\r" in data:
            return self._feed_otherwise(data)
        if data[:6] == b"data: " and data[-2:] == b"\n\n" and data.count(b"\n") == 2:
            return self._decode_one(data)  # most packets hold one event
        return self._feed_lines(data)

    def _decode_one(self, data: bytes) -> Block:
        """Decode one line, with the blank line after it."""
        try:
            chunk = self._strict.decode(data[6:])
        except FAULTS:
            return self._decode_lines(data)
        if chunk.completed is True or len(data) > self._max_event_bytes:
            return self._decode_lines(data)
        text = chunk.chunk
        self._has_text = self._has_text or text != ""
        self.request_id = chunk.request_id or self.request_id
        return Block([text], data)

    def _feed_lines(self, data: bytes) -> Block:
        """Take lines; the last one may still lack its end."""
        if data[-1:] not in (b"", b"\n"):
            cut = data.rfind(b"\n") + 1
            self._tail = bytearray(data[cut:])
            data = data[:cut]
        if len(data) > self._max_event_bytes:  # or else no event is too large
            return self._decode_lines(data)
        data = data.lstrip(b"\n")  # the rest of a blank line that two packets share
        template = self._template
        if template is not None:
            texts = template.read(data)
            if texts is not None:
                return self._block(texts, template.request_id, data)
        block = self._decode_together(data)
        return self._decode_lines(data) if block is None else block

    def _decode_together(self, data: bytes) -> Block | None:
        """Decode a packet of whole events, each of one line; None if it may hold anything else.

        `_decode_lines` would give the same block.
        """
        lines = data.rstrip(b"\n")
        events = lines[6:].split(b"\n\ndata: ")
        if lines[:6] != b"data: " or lines.count(b"\n") != 2 * len(events) - 2:
            return None
        try:
            chunks = list(map(self._strict.decode, events))
        except FAULTS:
            return None
        if True in [each.completed for each in chunks]:
            return None
        if len(chunks) > 1:
            self._learn(b"data: " + events[-1], b"\n\n", chunks[-1])
        return self._block([each.chunk for each in chunks], _last_id(chunks), data)

    def _learn(self, line: bytes, gap: bytes, chunk: Any) -> None:
        """Make a template of a line, for the events that follow; the one before did not fit."""
        self._template = None
        if self._lessons:
            self._lessons -= 1
            self._template = Template.learn(line, self._key, gap, chunk.request_id or None)

    def _block(self, texts: list[str], request_id: str | None, data: bytes) -> Block:
        """Return the block of chunk events that `data` holds, in whole lines."""
        self._has_text = self._has_text or any(texts)
        self.request_id = request_id or self.request_id
        return Block(texts, data)

    def _decode_lines(self, data: bytes) -> Block:
        """Decode line by line; give the first odd line, and all lines after it, to the parser."""
        chunks: list[Any] = []
        end = 0
        for line in data.split(b"\n"):
            if line[:6] == b"data: ":
                try:
                    chunk = self._strict.decode(line[6:])
                except FAULTS:
                    break
                if chunk.completed is True or len(line) > self._max_event_bytes:
                    break
                chunks.append(chunk)
                last = line
            elif line:
                break
            end += len(line) + 1
        if len(chunks) > 1 and self._template is None:
            gap = b"\n\n" if last + b"\n\n" in data else b"\n"
            self._learn(last, gap, chunks[-1])
        block = self._block([each.chunk for each in chunks], _last_id(chunks), data[:end])
        if end >= len(data):
            return block
        rest = data[end:] + (self._tail or b"")
        self._tail = None
        return block + self._feed_parser(rest)

    def end(self) -> Block:
        """Take the end of the body; return the events that the end completes.

        A last line without a line end counts if it is a whole event. Without the server's
        end marker, `failure` is set.
        """
        block = NOTHING if self._start is None else self._end_start()
        if not self.done:
            block += self._parse(bytes(self._tail or b"") + b"\n")
            self._tail = None
        if not self.done:
            self._ended_early = True
            self.failure = functools.partial(
                StreamInterruptedError, "The stream ended before the answer was complete"
            )
        return block

    def forget(self) -> None:
        """Release the bytes of an unfinished event: they may quote the API key."""
        self._parser = self._start = self._tail = None

    def _feed_otherwise(self, data: bytes) -> Block:
        if self.done:
            return NOTHING
        if self._start is not None:
            return self._feed_start(data)
        if not self._by_line:
            return self._feed_parser(data)
        data = data.replace(b"\r\n", b"\n")
        odd = b"\r" in data  # a line end of its own, which only the parser knows
        if self._tail is not None:
            self._tail += data
            if not odd and b"\n" not in data and len(self._tail) <= self._max_event_bytes:
                return NOTHING
            data = bytes(self._tail)
            self._tail = None
        odd = odd or len(data) - data.rfind(b"\n") - 1 > self._max_event_bytes
        return self._feed_parser(data) if odd else self._feed_lines(data)

    def _feed_start(self, data: bytes) -> Block:
        """Gather a body that begins as plain JSON: some servers send that for a stream."""
        assert self._start is not None  # noqa: S101 - for the type checker
        self._start += data
        if len(self._start) < len(BOM) and BOM.startswith(self._start):
            return NOTHING
        if _JSON_START.match(self._start) and len(self._start) <= self._max_event_bytes:
            return NOTHING
        return self.feed(self._leave_start())

    def _leave_start(self) -> bytes:
        start, self._start = bytes(self._start or b""), None
        self._by_line = True
        return start.removeprefix(BOM)

    def _end_start(self) -> Block:
        """Read the whole body as a plain answer or error if it is JSON, else as events."""
        gathered = self._leave_start()
        try:
            if isinstance(decode(gathered), dict):
                return self.body(gathered)
        except ValueError:
            pass
        except APIStatusError:
            text = self.secret.text(gathered.decode(errors="replace"))
            self.failure = functools.partial(_status_error, self._skill, text.encode())
            return NOTHING
        return self.feed(gathered)

    def body(self, data: bytes) -> Block:
        """Take a plain JSON answer that came where a stream was asked for, as one event.

        Raises:
            APIStatusError: The body is an error, or holds no answer.
        """
        result = read_result(self._skill, decode_json(data))
        self._note(result.raw)
        self._thoughts = result.get("reasoning")
        self._whole = result.raw
        self.request_id = result.request_id
        self.completed = True
        return Block.of([FinalEvent(chunk=self._text_of(result), raw=result.raw)])

    def _text_of(self, result: Result) -> str:
        text: str = result.get(ANSWER_KEY[self._skill], "")
        return text

    # -- odd lines ----------------------------------------------------------------

    def _feed_parser(self, data: bytes) -> Block:
        """Give whole lines to the parser, and the unfinished last line to whichever reads on.

        Reading goes back to `_feed_lines` as soon as the parser holds nothing back.
        """
        cut = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        block, rest = self._parse(data[:cut]), data[cut:]
        clear = not self.done and not self._half
        self._by_line = clear and self._is_between and len(rest) <= self._max_event_bytes
        if not self._by_line:
            return block + self._parse(rest)
        if rest:
            self._tail = bytearray(rest)
        return block

    def _parse(self, data: bytes) -> Block:
        if self.done:
            return NOTHING
        if self._parser is None:
            self._parser = SSEParser(max_event_bytes=self._max_event_bytes)
            self._parser.feed(b"\n")  # `_leave_start` has removed the byte order mark
        try:
            parsed = self._parser.read(data)
        except StreamProtocolError as error:
            self.failure = functools.partial(StreamProtocolError, str(error))
            return NOTHING
        self._is_between = self._parser.idle
        events: list[StreamEvent] = []
        for event, value in parsed:
            events += self._decode(event, value)
            if self.done:
                break
        return Block.of(events)

    def _decode(self, event: ServerSentEvent, value: Any) -> list[StreamEvent]:
        if value is None:
            said = event.data.strip()
            if not said and event.event != "error":
                return []  # some relays send empty events as heartbeats
            if said == "[DONE]":
                return self._finish({}, "")
            try:
                value = decode(event.data.encode(errors="replace"))
            except ValueError:
                value = event.data
        if event.event == "error" or (isinstance(value, dict) and value.get("error")):
            return self._fail_with(self.secret.value(value))
        if not isinstance(value, dict):
            return self._refuse("an event that is no JSON object", event.data)
        return self._decode_object(value, event)

    def _decode_object(self, raw: dict[str, Any], event: ServerSentEvent) -> list[StreamEvent]:
        self._note(raw)
        chunk = raw.get("chunk")
        if chunk is None:
            chunk = raw.get("text")
        if chunk is not None and not isinstance(chunk, str):
            return self._refuse("a chunk that is no text", show(chunk))
        kind = raw.get("type")
        is_last = raw.get("completed") is True or kind == "final"
        if chunk is not None:
            chunk, self._half = join_halves(self._half, chunk, event.data)
        events = self._think(raw, is_last=is_last)
        if is_last:
            return events + self._finish(raw, chunk or "")
        if chunk is not None or "chunk" in raw:
            self._has_text = self._has_text or bool(chunk)
            events.append(ChunkEvent(chunk=chunk or "", raw=raw))
        return events or [self._other_event(raw, kind, event)]

    def _other_event(self, raw: dict[str, Any], kind: Any, event: ServerSentEvent) -> StreamEvent:
        if kind == "bbox" and self.bbox is not None:
            return BboxEvent(bbox=self.bbox, raw=raw)
        if isinstance(raw.get("stats"), dict):
            return MetricsEvent(metrics=raw["stats"], raw=raw)
        return UnknownEvent(event=kind if isinstance(kind, str) else event.event, raw=raw)

    def _think(self, raw: dict[str, Any], *, is_last: bool) -> list[StreamEvent]:
        """Note reasoning: a string is a piece of it, an object is all of it."""
        value = raw.get("reasoning") or raw.get("reasoning_content")
        if isinstance(value, dict):
            self._thoughts = decode_reasoning(value)
            self._thought = None
        if not isinstance(value, str):
            return []
        if is_last and self._thought is not None and value == self._thought.getvalue():
            return []  # the last event repeats all of it
        return self._gather(Reasoning(text=value), raw)

    def _gather(self, piece: Reasoning, raw: dict[str, Any]) -> list[StreamEvent]:
        """Add a piece to the reasoning, in linear time over all pieces."""
        if self._thought is None:
            self._thought = StringIO()
            self._grounding = []
            if self._thoughts is not None:
                self._thought.write(self._thoughts.text)
                self._grounding += self._thoughts.grounding
        self._thoughts = None
        self._thought.write(piece.text)
        self._grounding += piece.grounding
        if self._thought.tell() > MAX_ANSWER_CHARACTERS:
            self.fail_for_length()
        return [ReasoningEvent(text=piece.text, raw=raw)]

    def fail_for_length(self) -> None:
        """Fail: the text or the reasoning is over `MAX_ANSWER_CHARACTERS`."""
        self.completed = False
        self.failure = functools.partial(
            StreamProtocolError,
            f"The answer is over the limit of {MAX_ANSWER_CHARACTERS} characters",
        )

    @property
    def reasoning(self) -> Reasoning | None:
        """The reasoning that has arrived."""
        if self._thoughts is None and self._thought is not None:
            self._thoughts = Reasoning(text=self._thought.getvalue(), grounding=self._grounding)
        return self._thoughts

    def result(self, text: str, headers: Mapping[str, str]) -> Result:
        """Return the result that a call without a stream would have given."""
        raw = self._as_body(text) if self._whole is None else self._whole
        return read_result(self._skill, raw, headers=headers)

    def _as_body(self, text: str) -> dict[str, Any]:
        last = {key: value for key, value in self._last.items() if key not in _OF_EVENTS}
        known = {
            "request_id": self.request_id,
            "finish_reason": self.finish_reason,
            "metrics": self.metrics,
            "reasoning": self.reasoning,
            "bbox": self.bbox,
            "parse_error": self.parse_error,
        }
        if self._skill == "segment" and self.path is not None:
            text = self.path
        answer = {ANSWER_KEY[self._skill]: text}
        return {**last, **{k: v for k, v in known.items() if v is not None}, **answer}

    def _refuse(self, what: str, text: str) -> list[StreamEvent]:
        message = f"The server sent {what}: {self.secret.text(text):.200}"
        self.failure = functools.partial(StreamProtocolError, message)
        return []

    def _finish(self, raw: dict[str, Any], chunk: str) -> list[StreamEvent]:
        if self._half:
            self._half, chunk = "", chunk + LOST
        if chunk in _DISGUISED_ERRORS:
            return self._fail_with({**raw, "error": chunk})
        if not chunk and not self._has_text:
            # No text was streamed, so the answer's text is in this last event, if anywhere.
            whole = raw.get(ANSWER_KEY.get(self._skill, ""))
            chunk = whole if isinstance(whole, str) else ""
        self.completed = True
        self._last = raw
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
        """Keep the fields of an event beside its text."""
        self.request_id = to_id(raw.get("request_id")) or self.request_id
        self.finish_reason = to_id(raw.get("finish_reason")) or self.finish_reason
        self.metrics = find_metrics(raw) or self.metrics
        self.usage = decode_usage(raw.get("usage")) or self.usage
        self.bbox = decode_region(raw.get("bbox")) or self.bbox
        self.parse_error = to_id(raw.get("parse_error")) or self.parse_error
        if isinstance(path := raw.get("path"), str):  # "" too: the coarse one is then not right
            self.path = path
        elif "path" in raw and self.parse_error:
            self.path = ""


def _last_id(chunks: list[Any]) -> str | None:
    """Return the id that the last of the events with one has."""
    ids = [each.request_id for each in chunks if each.request_id]
    return ids[-1] if ids else None


def _status_error(skill: Skill, data: bytes, partial: str = "") -> MoondreamError:  # noqa: ARG001
    """Make the error that a plain body describes; it holds no text of an answer."""
    try:
        read_result(skill, decode_json(data))
    except APIStatusError as error:
        return error.with_traceback(None)
    raise AssertionError  # `_end_start` has seen the same error
