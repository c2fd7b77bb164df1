"""The chunk events of nearly all of a stream's lines, decoded at once into a strict type.

A line with any field that these types do not have is odd: `events` decodes it another way.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from moondream_async.results import ChunkEvent, StreamEvent

from .decoding import FAULTS


class Chunk(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A chunk event of a skill. With `completed` true it is odd, too: it ends the answer."""

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


class ChatChunk(msgspec.Struct, rename={"request_id": "id"}, forbid_unknown_fields=True, gc=False):
    """A chunk event of a chat; its id has the name that `Chunk` gives it."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1, max_length=1)]
    request_id: str | UnsetType = UNSET
    object: str | UnsetType = UNSET
    created: int | UnsetType = UNSET
    model: str | UnsetType = UNSET
    usage: UnsetType | None = UNSET

    completed: ClassVar[bool] = False

    @property
    def chunk(self) -> str:
        """The text."""
        return self.choices[0].delta.content


class Block(msgspec.Struct, gc=False):
    """The events that one packet completed: their texts, and each event when it is asked for."""

    texts: list[str]
    """The text of each event; "" where it adds none."""
    events: Sequence[StreamEvent | bytes] | bytes
    """The events; in place of one that was not asked for, its line; or all lines in one piece."""

    @classmethod
    def of(cls, events: Sequence[StreamEvent]) -> Block:
        """Return a block of finished events."""
        return cls([event.chunk for event in events], events)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[StreamEvent]:
        return map(self.__getitem__, range(len(self.texts)))

    def __add__(self, other: Block) -> Block:
        texts = self.texts + other.texts
        if isinstance(self.events, bytes) and isinstance(other.events, bytes):
            return Block(texts, self.events + other.events)
        return Block(texts, [*self._each(), *other._each()])

    def __getitem__(self, index: int) -> StreamEvent:
        event = self._each()[index]
        if isinstance(event, StreamEvent):
            return event
        return ChunkEvent(chunk=self.texts[index], raw=msgspec.json.decode(event[6:]))

    def after(self, count: int) -> Block:
        """Return the block without its first `count` events."""
        return Block(self.texts[count:], self._each()[count:]) if count else self

    def _each(self) -> Sequence[StreamEvent | bytes]:
        if isinstance(self.events, bytes):
            self.events = [line for line in self.events.split(b"\n") if line]
        return self.events


NOTHING = Block([], b"")


class Template:
    """The bytes before and after the text in a stream's events, if only the texts differ.

    This is the one shortcut of the decoder: without it, a chat's events that come many at once
    take half as much time again. A stream whose events do not match is decoded without a
    template, with the same result.
    """

    __slots__ = ("_cut", "_gap", "_head", "_tail", "request_id")

    _decode_texts = msgspec.json.Decoder(list[str]).decode

    def __init__(self, head: bytes, tail: bytes, gap: bytes, request_id: str | None) -> None:
        self.request_id = request_id
        self._head = head
        self._tail = tail + gap
        self._gap = gap
        self._cut = operator.itemgetter(slice(len(head), -len(tail)))

    @classmethod
    def learn(cls, line: bytes, key: bytes, gap: bytes, request_id: str | None) -> Template | None:
        """Make a template of a line that was decoded as a chunk event; None if that is not safe.

        In JSON without a backslash every quote begins or ends a string. So `key`, with its quotes
        and its colon, is a key, and the next two quotes enclose its text.
        """
        _, _, after = line.partition(key)
        text = after.lstrip(b" ")
        if b"\\" in line or key in text or text[:1] != b'"':
            return None
        head = line[: len(line) - len(text) + 1]
        return cls(head, text[text.index(b'"', 1) :], gap, request_id)

    def read(self, block: bytes) -> list[str] | None:
        """Return the texts of a block whose events all match; None if one does not.

        The texts are cut out of the lines, and put back between the parts of the template: if
        this gives the same bytes, the lines hold nothing else. Then the texts are joined to a
        JSON list of strings, and decoded at once. Without an escaped quote, every quote in the
        list begins or ends a string; so if the list has as many strings as there are texts, no
        text holds a quote.
        """
        head, tail, gap = self._head, self._tail, self._gap
        if not block.endswith(gap):
            block += b"\n"  # the rest of the last blank line comes with the next packet
        if not block.endswith(tail):
            return None
        texts = list(map(self._cut, block.split(gap)))
        del texts[-1]  # the empty piece after the last gap
        if head + (tail + head).join(texts) + tail != block:
            return None
        quoted = b'["' + b'","'.join(texts) + b'"]'
        if b'\\"' in quoted:
            return None
        try:
            decoded = self._decode_texts(quoted)
        except FAULTS:
            return None
        return decoded if len(decoded) == len(texts) else None
