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

A stream is read line by line. Nearly all lines are ``data: {"chunk": ...}`` with nothing odd
in them: each is decoded once, into a strict type (`chunks`). The first line that does not fit
goes to `SSEParser`, which knows every rule, with all that follows in its packet; the parser
hands over what it has decoded. A line gives the same either way.
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
    ChatResult,
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
    find_reasoning,
    read_result,
    show,
    to_id,
)
from .chunks import NOTHING, Block, ChatChunk, Chunk, Template
from .decoding import FAULTS, decode
from .requests import Skill
from .secret import NOTHING_SECRET, Redactor
from .sse import BOM, ServerSentEvent, SSEParser

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Far above any event: the largest hold a mask in base64. More would hold up the event loop."""

MAX_ANSWER_CHARACTERS = 64 * 1024 * 1024
"""The text of one answer, and its reasoning, each: far above any, as that of a plain body is."""

_OF_EVENTS = frozenset({"chunk", "text", "completed", "type", "token_index", "reasoning_content"})
"""Keys that say something of a stream's last event, and not of the answer."""

_DISGUISED_ERRORS = frozenset(
    {
        # The old local server says so in the answer's text, and nowhere else.
        "An error occurred during caption generation.",
        "An error occurred during query processing.",
    }
)

_LESSONS = 4
"""Templates that are tried on a stream: its first event may be of a kind of its own."""

# Thousands of streams may be open, so what most never use is one for all; neither is changed.
_NO_GROUNDING: list[Grounding] = []
_NO_EVENT: dict[str, Any] = {}

_START = re.compile(rb"(?:%b)?\s*(.?)" % BOM, re.DOTALL)

_LOST = "\ufffd"
"""What a half of a surrogate pair is, unless the other half follows."""

_TEXT_KEY = r'"(?:chunk|text|content)"\s*:\s*"'
_LOW_HALF = re.compile(_TEXT_KEY + r"\\u([dD][c-fC-F][0-9a-fA-F]{2})")
_HIGH_HALF = re.compile(_TEXT_KEY + r"(?:[^\"\\]|\\.)*?\\u([dD][89abAB][0-9a-fA-F]{2})\"")


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
        self._thoughts: Reasoning | None = None  # the whole; or None while there are pieces
        self._thought: StringIO | None = None  # pieces
        self._grounding: list[Grounding] = _NO_GROUNDING
        self._last: dict[str, Any] = _NO_EVENT
        self._whole: dict[str, Any] | None = None  # answer, where it came as one
        self.usage: Usage | None = None
        self.bbox: Region | None = None
        self.path: str | None = None
        self.parse_error: str | None = None
        self.completed = False
        self.failure: Callable[..., MoondreamError] | None = None
        """Makes the error to raise once the events are used up; takes ``partial=``."""
        self._skill: Skill = skill
        self.secret = secret
        """Takes the API key out of an error that quotes it."""
        self._max_event_bytes = max_event_bytes
        self._start: bytearray | None = bytearray()  # until it is clear what has come
        self._by_line = False  # since nothing waits, neither there nor in the parser
        self._tail: bytearray | None = None  # of a line whose end has not come
        self._parser: SSEParser | None = None  # until a line is odd
        self._template: Template | None = None
        self._lessons = _LESSONS
        self._has_text = False
        self._half = ""  # of a surrogate pair, at a chunk's end: the next may have the other
        self._ended_early = False

    def fresh(self) -> AnswerDecoder:
        """Return a decoder for another try at the same answer."""
        return type(self)(self._skill, secret=self.secret, max_event_bytes=self._max_event_bytes)

    @property
    def done(self) -> bool:
        """Whether nothing that still comes can matter."""
        return self.completed or self.failure is not None

    def feed(self, data: bytes) -> Block:
        """Take the next bytes of the body; return the events that they complete."""
        if not self._by_line or self._tail is not None:
            return self._feed_otherwise(data)
        template = self._template
        if template is not None and len(data) <= self._max_event_bytes:
            text = template.read_one(data)  # as models write them: alone
            if text is not None:
                self.request_id = template.request_id or self.request_id
                self._has_text = self._has_text or text != ""
                return Block([text], data)
        if b"\r" in data:
            return self._feed_otherwise(data)
        return self._feed_lines(data)

    def _feed_lines(self, data: bytes) -> Block:
        """Take whole lines, and the beginning of one that waits for its end."""
        cut = data.rfind(b"\n") + 1
        if cut < len(data):
            self._tail = bytearray(data[cut:])
            data = data[:cut]
        template = self._template
        if template is not None and len(data) <= self._max_event_bytes:  # of one event
            texts = template.read(data)
            if texts is not None:
                self.request_id = template.request_id or self.request_id
                self._has_text = self._has_text or any(texts)
                return Block(texts, data)
        return self._decode_lines(data)

    def _decode_lines(self, data: bytes) -> Block:
        """Decode line by line; leave the first that is odd, and all that follow, to the parser."""
        texts: list[str] = []
        end = 0
        last = b""
        for line in data.split(b"\n"):
            if line[:6] == b"data: ":
                try:
                    chunk = self._strict.decode(line[6:])
                except FAULTS:
                    break
                if chunk.completed is True or len(line) > self._max_event_bytes:
                    break
                texts.append(chunk.chunk)
                self.request_id = chunk.request_id or self.request_id
                last = line
            elif line:
                break
            end += len(line) + 1
        self._has_text = self._has_text or any(texts)
        if last and self._lessons:
            self._lessons -= 1
            gap = b"\n\n" if last + b"\n\n" in data else b"\n"
            request_id = chunk.request_id or None
            self._template = Template.learn(last, self._key, gap, request_id) or self._template
        block = Block(texts, data[:end])
        if end >= len(data):
            return block
        rest = data[end:] + (self._tail or b"")
        self._tail = None
        return block + self._feed_parser(rest)

    def end(self) -> Block:
        """Take the end of the body; return the events that only it completes.

        A last line without its line end counts if it is a whole event. If the end
        marker has not come, `failure` is set.
        """
        block = NOTHING if self.done or self._start is None else self._end_start()
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
        """Let go of bytes that wait for more, which will not come: they may quote the key."""
        self._parser = self._start = self._tail = None

    def _feed_otherwise(self, data: bytes) -> Block:
        if self.done:
            return NOTHING
        if self._start is not None:
            return self._feed_start(data)
        if not self._by_line:
            return self._feed_parser(data)
        data = data.replace(b"\r\n", b"\n")
        odd = b"\r" in data  # which ends a line by itself
        if self._tail is not None:
            self._tail += data
            if not odd and b"\n" not in data and len(self._tail) <= self._max_event_bytes:
                return NOTHING
            data = bytes(self._tail)
            self._tail = None
        odd = odd or len(data) - data.rfind(b"\n") - 1 > self._max_event_bytes
        return self._feed_parser(data) if odd else self._feed_lines(data)

    def _feed_start(self, data: bytes) -> Block:
        """Gather what begins as JSON, and not as an event: some servers answer so all the same."""
        assert self._start is not None  # noqa: S101 - for the type checker
        self._start += data
        if len(self._start) < len(BOM) and BOM.startswith(self._start):
            return NOTHING
        if _begins_as_json(self._start) and len(self._start) <= self._max_event_bytes:
            return NOTHING
        return self.feed(self._leave_start())

    def _leave_start(self) -> bytes:
        start, self._start = bytes(self._start or b""), None
        self._by_line = True
        return start.removeprefix(BOM)

    def _end_start(self) -> Block:
        """Take the whole body for the answer or the error that it is; else for events."""
        gathered = self._leave_start()
        try:
            if isinstance(decode(gathered), dict):
                return self.body(gathered)
        except ValueError:
            pass
        except APIStatusError:
            text = self._redact(gathered.decode(errors="replace"))
            self.failure = functools.partial(_status_error, self._skill, text.encode())
            return NOTHING
        return self.feed(gathered)

    def body(self, data: bytes) -> Block:
        """Take a plain JSON answer that came where a stream was asked for, as one event.

        Raises:
            APIStatusError: It says that it is an error, or is no answer.
        """
        result = read_result(self._skill, decode_json(data))
        self._note(result.raw)
        self._thoughts = decode_reasoning(result.raw.get("reasoning"))
        self._whole = result.raw
        self.request_id = result.request_id
        self.completed = True
        return Block.of([FinalEvent(chunk=self._text_of(result), raw=result.raw)])

    def _text_of(self, result: Result) -> str:
        text: str = result.get(ANSWER_KEY[self._skill], "")
        return text

    # -- what is odd --------------------------------------------------------------

    def _feed_parser(self, data: bytes) -> Block:
        """Let the parser have lines; one that has not ended waits here, if nothing waits there."""
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
            self._parser.feed(b"\n")  # no byte order mark may come: it was looked for before
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
                return []  # relays send such to show that they are there, as others send comments
            if said == "[DONE]":
                return self._finish({}, "")
            value = _json_or_text(event.data)
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
            chunk = self._joined(chunk, event.data)
        events = self._think(raw, is_last=is_last)
        if is_last:
            return events + self._finish(raw, chunk or "")
        if chunk is not None or "chunk" in raw:
            self._has_text = self._has_text or bool(chunk)
            events.append(ChunkEvent(chunk=chunk or "", raw=raw))
        return events or [self._other_event(raw, kind, event)]

    def _joined(self, chunk: str, data: str) -> str:
        """Join a chunk with the half of a character that the one before ended in."""
        half, self._half = self._half, ""
        if half:
            other = _LOW_HALF.search(data) if chunk.startswith(_LOST) else None
            if other is not None:
                pair = (int(each, 16).to_bytes(2, "big") for each in (half, other[1]))
                chunk = b"".join(pair).decode("utf-16-be") + chunk[1:]
            else:
                chunk = _LOST + chunk
        begun = _HIGH_HALF.search(data) if chunk.endswith(_LOST) else None
        if begun is None:
            return chunk
        self._half = begun[1]
        return chunk[:-1]

    def _other_event(self, raw: dict[str, Any], kind: Any, event: ServerSentEvent) -> StreamEvent:
        if kind == "bbox" and self.bbox is not None:
            return BboxEvent(bbox=self.bbox, raw=raw)
        if isinstance(raw.get("stats"), dict):
            return MetricsEvent(metrics=raw["stats"], raw=raw)
        return UnknownEvent(event=kind if isinstance(kind, str) else event.event, raw=raw)

    def _think(self, raw: dict[str, Any], *, is_last: bool) -> list[StreamEvent]:
        """Gather reasoning: text is a piece of it, and an object the whole."""
        value = raw.get("reasoning") or raw.get("reasoning_content")
        if isinstance(value, dict):
            self._thoughts = decode_reasoning(value)
            self._thought = None
        if not isinstance(value, str):
            return []
        if is_last and self._thought is not None and value == self._thought.getvalue():
            return []  # the whole once more
        return self._gather(Reasoning(text=value), raw)

    def _gather(self, piece: Reasoning, raw: dict[str, Any]) -> list[StreamEvent]:
        """Add to the reasoning, in linear time however many pieces there are."""
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
        """Let the stream fail, since the text of its answer passes the limit."""
        self.completed = False
        self.failure = functools.partial(
            StreamProtocolError,
            f"The answer is over the limit of {MAX_ANSWER_CHARACTERS} characters",
        )

    @property
    def reasoning(self) -> Reasoning | None:
        """What the model thought, as far as it has arrived."""
        if self._thoughts is None and self._thought is not None:
            self._thoughts = Reasoning(text=self._thought.getvalue(), grounding=self._grounding)
        return self._thoughts

    def result(self, text: str, headers: Mapping[str, str]) -> Result:
        """Return the whole answer as a call without a stream would have given it."""
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
        answer = {ANSWER_KEY[self._skill]: self.path or text}
        return {**last, **{k: v for k, v in known.items() if v is not None}, **answer}

    def _refuse(self, what: str, text: str) -> list[StreamEvent]:
        message = f"The server sent {what}: {self._redact(text):.200}"
        self.failure = functools.partial(StreamProtocolError, message)
        return []

    def _redact(self, text: str) -> str:
        """Take the key out of what goes into an error. An answer is never touched."""
        return self.secret.text(text)

    def _finish(self, raw: dict[str, Any], chunk: str) -> list[StreamEvent]:
        if self._half:
            self._half, chunk = "", chunk + _LOST
        if chunk in _DISGUISED_ERRORS:
            return self._fail_with({**raw, "error": chunk})
        if not chunk and not self._has_text:
            # Nothing was streamed: then, and only then, the whole answer is news.
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
        """Keep what an event says beside its text."""
        self.request_id = to_id(raw.get("request_id")) or self.request_id
        self.finish_reason = to_id(raw.get("finish_reason")) or self.finish_reason
        self.metrics = find_metrics(raw) or self.metrics
        self.usage = decode_usage(raw.get("usage")) or self.usage
        self.bbox = decode_region(raw.get("bbox")) or self.bbox
        self.path = to_id(raw.get("path")) or self.path
        self.parse_error = to_id(raw.get("parse_error")) or self.parse_error


class ChatDecoder(AnswerDecoder):
    """One streamed turn of a chat, in the form of OpenAI's protocol."""

    __slots__ = ()
    _strict = msgspec.json.Decoder(ChatChunk)

    _key = b'"content":'

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
        self._thoughts = result.reasoning
        return result.message.content

    def _as_body(self, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if (reasoning := self.reasoning) is not None:
            message["reasoning"] = reasoning.text
            if reasoning.grounding:
                message["reasoning_details"] = {"grounding": reasoning.grounding}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        known = {"id": self.request_id, "usage": self.usage, "metrics": self.metrics}
        return {**{k: v for k, v in known.items() if v is not None}, "choices": [choice]}

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
        if chunk is not None:
            chunk = self._joined(chunk, event.data)
        events: list[StreamEvent] = []
        piece = find_reasoning(delta)
        if piece is not None:
            events += self._gather(piece, raw)
        if chunk or piece is None or self._half:
            self._has_text = self._has_text or bool(chunk)
            events.append(ChunkEvent(chunk=chunk or "", raw=raw))
        return events


def decoder_for(skill: Skill, *, secret: Redactor = NOTHING_SECRET) -> AnswerDecoder:
    """Return the decoder for a streamed answer of a skill."""
    return (ChatDecoder if skill == "chat" else AnswerDecoder)(skill, secret=secret)


def _status_error(skill: Skill, data: bytes, partial: str = "") -> MoondreamError:  # noqa: ARG001
    """Make the error that a body in place of a stream is."""
    try:
        read_result(skill, decode_json(data))
    except APIStatusError as error:
        return error.with_traceback(None)
    raise AssertionError  # it was one


def _begins_as_json(data: bytearray) -> bool:
    begun = _START.match(data)
    return begun is not None and begun[1] in (b"", b"{")


def _json_or_text(data: str) -> Any:
    try:
        return decode(data.encode(errors="replace"))
    except ValueError:
        return data
