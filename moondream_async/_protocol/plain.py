"""The short way through a stream: blocks of nothing but plain chunk events.

Nearly all that is ever sent are lines as ``data: {"chunk": "a "}`` that differ in
their text alone. Once one of them has been read, it is the `_Template` of those that
follow: these are cut out of their lines and decoded as one JSON list of strings. Where
other fields differ too, as kestrel's ``token_index``, a block is stripped down to
newline-delimited JSON and decoded in one call. What is not surely of either kind is
left to the long way (`events`), which gives the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Annotated, Any, Literal, overload

import msgspec
from msgspec import UNSET, UnsetType

from moondream_async.results import ChunkEvent, StreamEvent

_FAULTS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_LESSONS = 4
"""Templates that are tried on a stream: its first event may be of a kind of its own."""


class PlainChunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chunk event with nothing in it but these; read straight off the wire."""

    chunk: str
    type: Literal["path_delta"] | UnsetType = UNSET
    completed: bool | UnsetType = UNSET
    request_id: str | UnsetType = UNSET
    token_index: int | UnsetType = UNSET


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
    usage: UnsetType | None = UNSET

    @property
    def chunk(self) -> str:
        """The text, where `PlainChunk` has it."""
        return self.choices[0].delta.content

    @property
    def request_id(self) -> str | UnsetType:
        """The id, under the name that `PlainChunk` has for it."""
        return self.id


class Block(Sequence[StreamEvent]):
    """The events that one packet completed: their texts at once, themselves where asked for."""

    __slots__ = ("_events", "texts")

    def __init__(self, texts: list[str], events: list[_Raw]) -> None:
        self.texts = texts
        """The text of each event; "" where it adds none."""
        self._events = events

    @classmethod
    def of(cls, events: Sequence[StreamEvent | PlainChunk | PlainChatChunk]) -> Block:
        """Return a block of events that have been decoded."""
        return cls([event.chunk for event in events], [*events])

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Block) -> Block:
        return Block(self.texts + other.texts, self._events + other._events)

    @overload
    def __getitem__(self, index: int) -> StreamEvent: ...
    @overload
    def __getitem__(self, index: slice) -> Block: ...

    def __getitem__(self, index: int | slice) -> StreamEvent | Block:
        if isinstance(index, slice):
            return Block(self.texts[index], self._events[index])
        event = self._events[index]
        if isinstance(event, StreamEvent):
            return event
        if isinstance(event, _Template):
            return event.event(self.texts[index])
        return ChunkEvent(chunk=event.chunk, raw=msgspec.to_builtins(event))


NOTHING = Block([], [])


class _Template:
    """What all events of a block have around their text."""

    __slots__ = ("_cut", "_end", "_gap", "_head", "_start", "_tail", "request_id")

    _decode_text = msgspec.json.Decoder(str).decode
    _decode_texts = msgspec.json.Decoder(list[str]).decode

    def __init__(self, head: bytes, tail: bytes, gap: bytes, request_id: str | None) -> None:
        self.request_id = request_id
        self._head = head
        self._tail = tail + gap
        self._start = len(head)
        self._end = -len(self._tail)
        self._gap = gap
        self._cut = operator.itemgetter(slice(len(head), -len(tail)))

    @classmethod
    def learn(cls, line: bytes, key: bytes, gap: bytes, request_id: str | None) -> _Template | None:
        """Take a line that was decoded as a plain event for one; None if it makes none.

        In JSON without a backslash every quote begins or ends a string. So the `key`,
        with its quotes and its colon, is one indeed, and the quotes after it are its text's.
        """
        _, _, after = line.partition(key)
        text = after.lstrip(b" ")
        if b"\\" in line or key in text or text[:1] != b'"':
            return None
        head = line[: len(line) - len(text) + 1]
        return cls(head, text[text.index(b'"', 1) :], gap, request_id)

    def read(self, block: bytes) -> list[str] | None:
        """Return the texts of a block whose events are all like this; None if one is not.

        What is cut out of the lines is put back between the parts of the template: if that
        gives the same bytes, there is nothing else in them. Then the texts are put in the
        quotes of a list's. If no quote in there is escaped, all of them are those of
        strings; and if there are as many strings as texts, these have none of their own.
        """
        head, tail = self._head, self._tail
        if not block.endswith(tail):
            return None
        texts = list(map(self._cut, block.split(self._gap)))
        del texts[-1]  # behind the last gap
        if head + (tail + head).join(texts) + tail != block:
            return None
        quoted = b'["' + b'","'.join(texts) + b'"]'
        if b'\\"' in quoted:
            return None
        try:
            decoded = self._decode_texts(quoted)
        except _FAULTS:
            return None
        return decoded if len(decoded) == len(texts) else None

    def read_one(self, data: bytes) -> Block | None:
        """Return a block of one event like this, as models write them; None if it is not."""
        text = data[self._start : self._end]
        if b'"' in text or self._head + text + self._tail != data:
            return None
        try:
            return Block([self._decode_text(b'"' + text + b'"')], [self])
        except _FAULTS:
            return None

    def event(self, text: str) -> ChunkEvent:
        """Return the event with this text."""
        raw = self._head[6:-1] + msgspec.json.encode(text) + self._tail[1:]
        return ChunkEvent(chunk=text, raw=msgspec.json.decode(raw))


_Raw = StreamEvent | PlainChunk | PlainChatChunk | _Template
"""What an event is made of when somebody asks for it."""


class PlainLines:
    """Decodes blocks of plain chunk events, which are those of one stream."""

    __slots__ = ("_decode_lines", "_has_gaps", "_key", "_lessons", "request_id", "template")

    def __init__(self, key: bytes, decoder: msgspec.json.Decoder[Any]) -> None:
        self.request_id: str | None = None
        """The last one in the latest block."""
        self._key = key  # of the text
        self._decode_lines = decoder.decode_lines
        self._has_gaps = False  # blank lines, between the events
        self.template: _Template | None = None
        self._lessons = _LESSONS

    def decode(self, block: bytes) -> Block | None:
        """Decode whole lines ``data: {...}``; None if anything else may be in there.

        All of them are followed by a blank line, or none is. Where a packet was cut in the
        middle of that, its halves count for nothing: the event has ended with its own line.
        """
        self.request_id = None
        if block[:1] == b"\n":
            block = block.lstrip(b"\n")
            if not block:
                return NOTHING
        if not block.endswith(b"\n\n") and (self._has_gaps or b"}\n\n" in block):
            block += b"\n"
        template = self.template
        if template is not None:
            texts = template.read(block)
            if texts is not None:
                self.request_id = template.request_id
                return Block(texts, [template] * len(texts))
        return self._decode_any(block)

    def _decode_any(self, block: bytes) -> Block | None:
        """Decode a block line by line, with what is known so far of the stream.

        The lines are stripped down to newline-delimited JSON. That is sound only if
        each JSON value is one line's whole data: so every line break must stand
        between ``}`` and ``data: {``, where no JSON value can go on from one line to
        the next, and there must be as many values as lines.
        """
        if not block.startswith(b"data: {") or b"true" in block:
            return None
        gap = b"\n\n" if block.endswith(b"}\n\n") else b"\n"
        if not block.endswith(b"}" + gap):
            return None
        lines = block[6:].replace(b"}%bdata: {" % gap, b"}\n{")
        count = (len(block) - 6 - len(lines)) // (len(gap) + 5) + 1
        if lines.count(b"\n") != count - 1 + len(gap):
            return None
        try:
            events: list[PlainChunk | PlainChatChunk] = self._decode_lines(lines)
        except _FAULTS:
            return None  # not plain, or not JSON; the long way knows which
        if len(events) != count:
            return None
        self._has_gaps = len(gap) == 2
        for event in reversed(events):
            if event.request_id:
                self.request_id = event.request_id
                break
        if self._lessons:
            self._lessons -= 1
            line = block[: -len(gap)].rpartition(b"\n")[2]
            self.template = (
                _Template.learn(line, self._key, gap, events[-1].request_id or None)
                or self.template
            )
        return Block.of(events)
