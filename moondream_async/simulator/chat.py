"""Chat completions in the style of OpenAI, as the cloud offers them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from . import answers
from .dialects import Answer, Body, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .steps import Event, Reply, Route, Steps
from .validation import RefusedError, read_typed

_DEFAULT_MODEL = "moondream3-preview"


class ImageUrl(msgspec.Struct, frozen=True):
    """Where a picture is; only data URLs are taken."""

    url: str


class TextPart(msgspec.Struct, frozen=True, tag="text"):
    """A piece of text in a message."""

    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image_url"):
    """A picture in a message."""

    image_url: ImageUrl


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | ImagePart]

    @property
    def text(self) -> str:
        """Its pieces of text, joined."""
        if isinstance(self.content, str):
            return self.content
        return " ".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """The data URLs of its pictures."""
        if isinstance(self.content, str):
            return []
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class ChatBody(msgspec.Struct, frozen=True):
    """The body of ``/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str = _DEFAULT_MODEL
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None
    reasoning: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer."""

    id: str
    created: int
    model: str
    reasoning: list[str]
    """Its words; the tokens of the answer come after."""
    words: list[str]
    finish_reason: str
    prompt_tokens: int

    @property
    def usage(self) -> Body:
        """The counts of tokens."""
        written = len(self.reasoning) + len(self.words)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    def body(self) -> Body:
        """Return it as one JSON body."""
        message: Body = {"role": "assistant", "content": "".join(self.words)}
        if self.reasoning:
            message["reasoning"] = "".join(self.reasoning)
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": self.usage}

    def events(self, dialect: Dialect, *, include_usage: bool) -> Iterator[Event]:
        """Yield it as events: the words of the reasoning, those of the answer, and the end.

        The key of the reasoning's pieces is a guess: no server's is documented.
        """
        deltas: list[Body] = [{"reasoning": word} for word in self.reasoning]
        deltas += [{"content": word} for word in self.words]
        for index, delta in enumerate(deltas):
            role = {"role": "assistant"} if index == 0 else {}
            yield dialect.encode(self._chunk(role | delta, None), tokens=1)
        yield dialect.encode(self._chunk({}, self.finish_reason), last=True)
        if include_usage:
            head = self._head("chat.completion.chunk")
            yield dialect.encode(head | {"choices": [], "usage": self.usage}, last=True)
        yield dialect.encode_text("[DONE]", last=True)

    def _head(self, kind: str) -> Body:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: Body, finish_reason: str | None) -> Body:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._head("chat.completion.chunk") | {"choices": [choice]}


class Chat:
    """Answers the last question of a conversation, about the pictures nearest before it."""

    def __init__(self, dialect: Dialect, gallery: Gallery) -> None:
        self._dialect = dialect
        self._gallery = gallery
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return the one endpoint."""
        path = f"{self._dialect.prefix}/chat/completions"
        return [Route("POST", path, self._complete, "bearer", skill="chat")]

    async def _complete(self, received: ReceivedRequest) -> Reply | Steps:
        body = read_typed(received.body, ChatBody)
        _check_conversation(body.messages)
        answer = received.scripted.begin() if received.scripted else None
        if answer is None:
            answer = await self._solve(body)
        thought = answer.reasoning["text"] if answer.reasoning else ""
        self._answered += 1
        completion = Completion(
            id=f"chatcmpl-{self._answered:08x}",
            created=int(time.time()),
            model=body.model,
            reasoning=answers.split_words(thought),
            words=answer.pieces,
            finish_reason=answer.finish_reason,
            prompt_tokens=_count_prompt(body.messages),
        )
        if not received.stream:
            return Reply(body=completion.body())
        options = body.stream_options or StreamOptions()
        return completion.events(self._dialect, include_usage=options.include_usage)

    async def _solve(self, body: ChatBody) -> Answer:
        question = body.messages[-1].text
        shown = [message.images for message in body.messages if message.images]
        pictures = [await self._gallery.look(url) for url in (shown[-1] if shown else [])]
        text = answers.answer_about_several(pictures, question)
        thought = ""
        if body.reasoning:
            thought = answers.think(pictures[0] if pictures else None, question)["text"]
        limit = body.max_completion_tokens or body.max_tokens or 4096
        reasoning = answers.split_words(thought)
        words = answers.split_words(text)
        kept = words[: max(0, limit - len(reasoning))]
        return Answer(
            skill="chat",
            result={"content": "".join(kept)},
            reasoning={"text": "".join(reasoning[:limit])},
            pieces=kept,
            finish_reason="stop" if len(reasoning) + len(words) <= limit else "length",
        )


def _check_conversation(messages: list[Message]) -> None:
    """Keep to the engine's rules.

    Raises:
        RefusedError: A message is where it may not be.
    """
    systems = [index for index, message in enumerate(messages) if message.role == "system"]
    if len(systems) > 1:
        # Seen at the cloud: this fault of the caller's comes with a server's status.
        raise RefusedError("Only one system message is allowed", status=500, param="messages")
    if systems and systems != [0]:
        raise RefusedError("A system message must come first", param="messages")
    if messages[-1].role != "user":
        raise RefusedError("The last message must be from the user", param="messages")
    if any(message.images and message.role != "user" for message in messages):
        raise RefusedError("Images are allowed in user messages only", param="messages")
    if not messages[-1].text.strip():
        raise RefusedError("The last message must hold a text", param="messages")


def _count_prompt(messages: list[Message]) -> int:
    words = sum(len(message.text.split()) for message in messages)
    return words + 729 * sum(len(message.images) for message in messages)
