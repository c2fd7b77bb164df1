"""Turns questions of the page into calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import msgspec

from moondream_async import MoondreamClient, RequestError
from moondream_async._stream.stream import Stream
from moondream_async.results import Result
from moondream_async.types import Length

if TYPE_CHECKING:
    from aiohttp import web


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question of the page; each skill uses its own fields.

    The client checks the values, and the page shows the client's errors.
    """

    skill: Literal["caption", "query", "detect", "point", "segment", "chat"]
    length: Length = "normal"
    question: str = ""
    object: str = ""
    reasoning: bool | None = None
    messages: tuple[Turn, ...] = ()
    settings: dict[str, Any] = {}


async def read_question(request: web.Request) -> tuple[Question, bytes]:
    """Read a body: the question as a line of JSON, and then the picture's file.

    Raises:
        RequestError: The first line is not a question.
        web.HTTPRequestEntityTooLarge: The body is larger than the application takes.
    """
    question, _, picture = (await request.read()).partition(b"\n")
    try:
        return msgspec.json.decode(question, type=Question), picture
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The question could not be read: {error}") from error


async def ask(client: MoondreamClient, question: Question, picture: bytes) -> Stream | Result:
    """Ask the server; return a stream, or the whole answer of a skill without streams.

    Cancelling drops the connection to the server.

    Raises:
        MoondreamError: The call failed.
    """
    own: dict[str, dict[str, Any]] = {
        "caption": {"length": question.length},
        "query": {"question": question.question, "reasoning": question.reasoning},
        "chat": {"reasoning": question.reasoning},
    }
    arguments = own.get(question.skill, {"object": question.object})
    if question.skill not in ("detect", "point"):
        arguments["stream"] = True
    about = _with_picture(question.messages, picture) if question.skill == "chat" else picture
    call = getattr(client, question.skill)
    answer: Stream | Result = await call(about, settings=question.settings or None, **arguments)
    return answer


def _with_picture(turns: tuple[Turn, ...], picture: bytes) -> list[dict[str, Any]]:
    """Return the conversation with the picture in its first message."""
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": turn.content} for turn in turns
    ]
    if messages:
        messages[0]["content"] = [messages[0]["content"], picture]
    return messages
