"""Chat completions in the style of OpenAI, as the cloud offers them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from . import answers
from .dialects import Dialect
from .pixels import look
from .received import ReceivedRequest
from .steps import Answer, Body, Event, Route, Steps, say, split_words
from .validation import RefusedError, Temperature, TopP, read_typed

_MaxTokens = Annotated[int, Meta(ge=1, le=4096)]


class _ImageUrl(msgspec.Struct, frozen=True):
    url: str


class _Text(msgspec.Struct, frozen=True, tag="text"):
    text: str


class _Image(msgspec.Struct, frozen=True, tag="image_url"):
    image_url: _ImageUrl


class _Message(msgspec.Struct, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Text | _Image]

    def _parts(self) -> list[_Text | _Image]:
        return [_Text(self.content)] if isinstance(self.content, str) else self.content

    @property
    def text(self) -> str:
        return " ".join(part.text for part in self._parts() if isinstance(part, _Text))

    @property
    def images(self) -> list[str]:
        return [part.image_url.url for part in self._parts() if isinstance(part, _Image)]


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class _ChatBody(msgspec.Struct, frozen=True):
    messages: Annotated[list[_Message], Meta(min_length=1)]
    model: str = "moondream3-preview"
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_completion_tokens: _MaxTokens | None = None
    max_tokens: _MaxTokens | None = None
    reasoning: bool = False
    stream: bool = False
    stream_options: _StreamOptions | None = None

    def __post_init__(self) -> None:
        """Check the engine's rules for the order of messages."""
        roles = [message.role for message in self.messages]
        last = self.messages[-1]
        rules = (
            # Seen at the cloud: status 500, although the caller is at fault.
            (roles.count("system") > 1, "Only one system message is allowed", 500),
            ("system" in roles[1:], "A system message must come first", 400),
            (last.role != "user", "The last message must be from the user", 400),
            (
                any(message.images and message.role != "user" for message in self.messages),
                "Images are allowed in user messages only",
                400,
            ),
            (not last.text.strip(), "The last message must hold a text", 400),
        )
        for broken, rule, status in rules:
            if broken:
                raise RefusedError(rule, status=status, param="messages")


class Chat:
    """Answers the last question of a conversation, about the latest pictures."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return the one endpoint."""
        path = f"{self._dialect.prefix}/chat/completions"
        return [Route("POST", path, self._complete, "bearer", skill="chat")]

    async def _complete(self, received: ReceivedRequest) -> Body | Steps:
        body = read_typed(received.body, _ChatBody)
        answer: Answer = await received.find(_measure, body)
        self._answered += 1
        head = {
            "id": f"chatcmpl-{self._answered:08x}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body.model,
        }
        thought = answer.reasoning["text"] if answer.reasoning else ""
        prompt = sum(len(each.text.split()) + 729 * len(each.images) for each in body.messages)
        written = len(split_words(thought)) + len(answer.pieces)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
        }
        if received.stream:
            asked = body.stream_options is not None and body.stream_options.include_usage
            return self._events(answer, thought, head, usage if asked else None)
        message = {"role": "assistant", "content": "".join(answer.pieces)}
        if thought:
            message["reasoning"] = thought
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        return head | {"choices": [choice], "usage": usage}

    def _events(
        self, answer: Answer, thought: str, head: Body, usage: Body | None
    ) -> Iterator[Event]:
        """Yield the words of the reasoning, the words of the answer, and the end.

        The key of the reasoning's pieces is a guess: no server's is documented.
        """
        head = head | {"object": "chat.completion.chunk"}
        deltas: list[Body] = [{"reasoning": word} for word in split_words(thought)]
        deltas += [{"content": word} for word in answer.pieces]
        role = {"role": "assistant"}
        for delta in deltas:
            choice = {"index": 0, "delta": role | delta, "finish_reason": None}
            yield self._dialect.encode(head | {"choices": [choice]}, tokens=1)
            role = {}
        choice = {"index": 0, "delta": {}, "finish_reason": answer.finish_reason}
        yield self._dialect.encode(head | {"choices": [choice]}, last=True)
        if usage is not None:
            yield self._dialect.encode(head | {"choices": [], "usage": usage}, last=True)
        yield self._dialect.encode_text("[DONE]", last=True)


def _measure(body: _ChatBody) -> Answer:
    question = body.messages[-1].text
    shown = [message.images for message in body.messages if message.images]
    pictures = [look(url) for url in (shown[-1] if shown else [])]
    limit = body.max_completion_tokens or body.max_tokens or 4096
    thought = answers.think(pictures, question)["text"] if body.reasoning else ""
    words = split_words(thought)
    text = answers.answer(pictures, question)
    answer = say("chat", "content", text, max(0, limit - len(words)))
    answer.reasoning = {"text": "".join(words[:limit])}
    return answer
