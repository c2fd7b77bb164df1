"""The endpoints that answer about one picture, and those that tell of the server."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

import anyio.to_thread

from . import answers
from .dialects import MODELS, Answer, Dialect
from .pixels import Picture, UnreadablePictureError, measure
from .received import ReceivedRequest
from .steps import Reply, Route, Steps
from .validation import (
    BodyT,
    CaptionBody,
    QueryBody,
    RefusedError,
    SkillBody,
    decode_image,
    read_body,
)

# How many pictures' measurements are kept; each is some tens of kilobytes.
_KEPT_PICTURES = 64


class Gallery:
    """Measures pictures in a worker thread, the same picture once."""

    def __init__(self) -> None:
        self._measured: OrderedDict[bytes, Picture] = OrderedDict()

    async def look(self, image_url: str) -> Picture:
        """Decode a data URL and measure the picture in it.

        Cancelling waits for the thread, which takes tenths of a second at most.

        Raises:
            RefusedError: There is no picture in what was sent.
        """
        return await anyio.to_thread.run_sync(self._look, image_url)

    def _look(self, image_url: str) -> Picture:
        data = decode_image(image_url)
        digest = hashlib.sha256(data).digest()
        picture = self._measured.get(digest)
        if picture is None:
            try:
                picture = self._measured[digest] = measure(data)
            except UnreadablePictureError as error:
                raise RefusedError("Invalid image data", param="image_url") from error
            while len(self._measured) > _KEPT_PICTURES:
                self._measured.popitem(last=False)
        return picture


class Skills:
    """Caption and query, and the small endpoints around them."""

    def __init__(self, dialect: Dialect, gallery: Gallery) -> None:
        self._dialect = dialect
        self._gallery = gallery
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return what the dialect serves, where it serves it."""
        skills = {"caption": self._caption, "query": self._query}
        routes = [Route("GET", path, self._health, "none") for path in ("/health", "/healthz")]
        if self._dialect.lenient:
            routes += [
                Route("GET", "/v1/models", self._models, "none"),
                Route("GET", "/v1/stats", self._stats, "none"),
                *(
                    Route("*", f"{prefix}/{skill}", skills[skill], "none")
                    for skill in self._dialect.skills
                    for prefix in ("/v1", "")
                ),
                Route("*", "/v1/{function}", self._no_such_function, "none"),
                Route("*", "/{function}", self._no_such_function, "none"),
            ]
            return routes
        prefix = self._dialect.prefix
        if self._dialect.lists_models:
            routes.append(Route("GET", f"{prefix}/models", self._models, "optional"))
        routes += [
            Route("POST", f"{prefix}/{skill}", skills[skill]) for skill in self._dialect.skills
        ]
        return routes

    async def _caption(self, received: ReceivedRequest) -> Reply | Steps:
        started = time.perf_counter()
        body = self._read(received, CaptionBody)
        picture = await self._look(body)
        text = answers.caption(picture, body.length) if picture else ""
        answer = self._make_answer("caption", "caption", text, body, started)
        return self._tell(received, answer)

    async def _query(self, received: ReceivedRequest) -> Reply | Steps:
        started = time.perf_counter()
        body = self._read(received, QueryBody, needs_image=not self._dialect.text_only)
        if body.reasoning and body.stream and not self._dialect.streams_reasoning:
            raise RefusedError("Streaming is not supported when reasoning is enabled")
        picture = await self._look(body)
        text = answers.answer(picture, body.question, body.spatial_refs or [])
        answer = self._make_answer("query", "answer", text, body, started)
        answer.question_words = len(body.question.split())
        if body.reasoning:
            answer.reasoning = answers.think(picture, body.question)
        return self._tell(received, answer)

    async def _models(self, _: ReceivedRequest) -> Reply:
        return Reply(body=self._dialect.models())

    async def _health(self, _: ReceivedRequest) -> Reply:
        return Reply(body=self._dialect.health)

    async def _stats(self, _: ReceivedRequest) -> Reply:
        return Reply(
            body={
                "workers": 1,
                "queue_size": 0,
                "max_queue_size": 10,
                "processing": 0,
                "timeouts": 0,
                "default_timeout": 30.0,
                "model": MODELS[0],
                "status": "running",
                "requests_processed": self._answered,
            }
        )

    async def _no_such_function(self, received: ReceivedRequest) -> Reply:
        return Reply(body={"error": f"Function '{received.params['function']}' not available"})

    def _read(
        self, received: ReceivedRequest, kind: type[BodyT], *, needs_image: bool = True
    ) -> BodyT:
        body = received.body
        if self._dialect.lenient:  # only what is there and is not empty; any value for a boolean
            known = ("image_url", "question", "length", "settings")
            given = {name: body[name] for name in known if body.get(name)}
            body = given | {name: bool(body.get(name)) for name in ("stream", "reasoning")}
        return read_body(body, kind, needs_image=needs_image)

    async def _look(self, body: SkillBody) -> Picture | None:
        return await self._gallery.look(body.image_url) if body.image_url else None

    def _make_answer(
        self, skill: str, key: str, text: str, body: SkillBody, started: float
    ) -> Answer:
        self._answered += 1
        words = answers.split_words(text)
        return Answer(
            skill=skill,
            number=self._answered,
            key=key,
            words=words[: body.max_tokens],
            finish_reason="stop" if len(words) <= body.max_tokens else "length",
            has_image=body.image_url is not None,
            received=started,
        )

    def _tell(self, received: ReceivedRequest, answer: Answer) -> Reply | Steps:
        if received.stream:
            return self._dialect.events(answer)
        return Reply(body=self._dialect.body(answer))
