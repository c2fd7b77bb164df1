"""The decoder of each skill's stream: a chat's events are OpenAI's, all others are Moondream's."""

from __future__ import annotations

from typing import Any

import msgspec

from moondream_async.results import (
    ChatResult,
    ChunkEvent,
    MetricsEvent,
    Result,
    StreamEvent,
    UnknownEvent,
)

from .answers import decode_usage, find_id, find_metrics, find_reasoning, show, to_id
from .chunks import Block, ChatChunk
from .decoding import join_halves
from .events import AnswerDecoder
from .requests import Skill
from .secret import NOTHING_SECRET, Redactor
from .sse import ServerSentEvent


def decoder_for(skill: Skill, *, secret: Redactor = NOTHING_SECRET) -> AnswerDecoder:
    """Return a decoder for a streamed answer of a skill."""
    return (ChatDecoder if skill == "chat" else AnswerDecoder)(skill, secret=secret)


class ChatDecoder(AnswerDecoder):
    """Decodes one streamed turn of a chat, in OpenAI's protocol."""

    __slots__ = ()
    _strict = msgspec.json.Decoder(ChatChunk)
    _key = b'"content":'

    def end(self) -> Block:
        """Take the end of the body; a `finish_reason` counts as the end marker."""
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
        self.request_id = find_id(raw) or self.request_id
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
        if delta is None and not self._has_text:
            delta = choice.get("message")  # the whole answer, where nothing was streamed
        if not isinstance(delta, dict):
            return [UnknownEvent(event=event.event, raw=raw)]
        chunk = delta.get("content")
        if chunk is not None and not isinstance(chunk, str):
            return self._refuse("a chunk that is no text", show(chunk))
        if chunk is not None:
            chunk, self._half = join_halves(self._half, chunk, event.data)
        events: list[StreamEvent] = []
        piece = find_reasoning(delta)
        if piece is not None:
            events += self._gather(piece, raw)
        if chunk or piece is None or self._half:
            self._has_text = self._has_text or bool(chunk)
            events.append(ChunkEvent(chunk=chunk or "", raw=raw))
        return events
