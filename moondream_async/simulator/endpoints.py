"""The endpoints that answer about one picture, and those that tell of the server."""

from __future__ import annotations

import functools
import time
from typing import Any

from .dialects import MODELS, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Reply, Route, Steps
from .validation import RefusedError, read_body

_STATION_FIELDS = ("image_url", "question", "object", "length", "settings")


class Endpoints:
    """The skills of a dialect, its list of models, and its health."""

    def __init__(self, dialect: Dialect, gallery: Gallery) -> None:
        self._dialect = dialect
        self._gallery = gallery
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return what the dialect serves, where it serves it."""
        health = [Route("GET", path, self._health, "none") for path in ("/health", "/healthz")]
        if self._dialect.lenient:
            return health + self._station_routes()
        prefix = self._dialect.prefix
        skills = [
            Route("POST", f"{prefix}/{skill}", functools.partial(self._answer, skill), skill=skill)
            for skill in self._dialect.skills
        ]
        if self._dialect.hosted:
            skills.append(Route("GET", f"{prefix}/models", self._models, "optional"))
        return health + skills

    def _station_routes(self) -> list[Route]:
        """Return Station's routes: any method, with and without ``/v1``, and no keys."""
        skills = [
            Route(
                "*",
                f"{prefix}/{skill}",
                functools.partial(self._answer, skill),
                "none",
                skill=skill,
            )
            for skill in self._dialect.skills
            for prefix in ("/v1", "")
        ]
        return [
            Route("GET", "/v1/models", self._models, "none"),
            Route("GET", "/v1/stats", self._stats, "none"),
            *skills,
            Route("*", "/v1/{function}", self._no_such_function, "none"),
            Route("*", "/{function}", self._no_such_function, "none"),
        ]

    async def _answer(self, name: str, received: ReceivedRequest) -> Reply | Steps:
        started = time.perf_counter()
        skill = SKILLS[name]
        dialect = self._dialect
        needs_image = name != "query" or not dialect.text_only
        body = read_body(self._given(received), skill.body, needs_image=needs_image)
        stream = received.stream and skill.streams
        if stream and getattr(body, "reasoning", False) and not dialect.streams_reasoning:
            raise RefusedError("Streaming is not supported when reasoning is enabled")
        answer = received.scripted.begin() if received.scripted else None
        if answer is None:
            picture = await self._gallery.look(body.image_url) if body.image_url else None
            answer = skill.solve(body, picture)
        self._answered += 1
        answer.number = self._answered
        answer.received = started
        return dialect.events(answer) if stream else Reply(body=dialect.body(answer))

    def _given(self, received: ReceivedRequest) -> Any:
        """Return the body, or what Station makes of it: blank is absent, any value a boolean."""
        body = received.body
        if not self._dialect.lenient:
            return body
        given = {name: body[name] for name in _STATION_FIELDS if body.get(name)}
        return given | {name: bool(body.get(name)) for name in ("stream", "reasoning")}

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
