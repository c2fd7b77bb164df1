"""The chunk events of nearly all of a stream's lines, decoded at once into a strict type.

A line with any field that these types do not have is odd: `events` decodes it another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

from moondream_async.results import ChunkEvent, StreamEvent


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
    """A chunk event of a chat; the attributes that are used have the names that `Chunk` gives."""

    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1, max_length=1)]
    request_id: str | UnsetType = UNSET
    object: str | UnsetType = UNSET
    created: int | UnsetType = UNSET
    model: str | UnsetType = UNSET
    usage: UnsetType | None = UNSET

    completed: ClassVar[bool] = False

    @property
    def chunk(self) -> str:
        """The text of the event."""
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
