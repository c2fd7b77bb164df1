"""The endpoints of the skills, of the list of models, and of the server's health."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from .dialects import MODELS, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Body, Route, Steps
from .validation import RefusedError, read_body

_STATION_FIELDS = ("image_url", "question", "object", "length", "settings")


class Endpoints:
    """The skills of a dialect, its list of models, and its health."""

    def __init__(self, dialect: Dialect, gallery: Gallery) -> None:
        self._dialect = dialect
        self._gallery = gallery
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return the endpoints of the dialect."""
        dialect = self._dialect
        prefix, health, models = dialect.prefix, partial(_say, dialect.health), dialect.models()
        routes = [Route("GET", path, health, "none") for path in ("/health", "/healthz")]
        if dialect.hosted or dialect.lenient:
            routes.append(Route("GET", f"{prefix}/models", partial(_say, models), "optional"))
        if not dialect.lenient:
            return routes + self._skills("POST", prefix)
        # Station takes any method, and paths with and without its prefix.
        routes.append(Route("GET", f"{prefix}/stats", self._stats))
        for start in (prefix, ""):
            routes += self._skills("*", start)
        for start in (prefix, ""):
            routes.append(Route("*", f"{start}/{{function}}", _no_such_function))
        return routes

    def _skills(self, method: str, prefix: str) -> list[Route]:
        return [
            Route(method, f"{prefix}/{skill}", partial(self._answer, skill), skill=skill)
            for skill in self._dialect.skills
        ]

    async def _answer(self, name: str, received: ReceivedRequest) -> Body | Steps:
        started = time.perf_counter()
        skill, dialect = SKILLS[name], self._dialect
        needs_image = name != "query" or not dialect.text_only
        body = read_body(self._given(received), skill.body, needs_image=needs_image)
        stream = received.stream and skill.streams
        if stream and getattr(body, "reasoning", False) and not dialect.streams_reasoning:
            raise RefusedError("Streaming is not supported when reasoning is enabled")
        answer = received.scripted.begin() if received.scripted else None
        if answer is None:
            answer = await self._gallery.run(skill.answer, body, self._gallery)
        self._answered += 1
        answer.number, answer.received = self._answered, started
        return dialect.events(answer) if stream else dialect.body(answer)

    def _given(self, received: ReceivedRequest) -> Any:
        """Return the body, as Station reads it: a blank field is absent, any value a boolean."""
        body = received.body
        if not self._dialect.lenient:
            return body
        given = {name: body[name] for name in _STATION_FIELDS if body.get(name)}
        return given | {name: bool(body.get(name)) for name in ("stream", "reasoning")}

    async def _stats(self, _: ReceivedRequest) -> Body:
        return {
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


async def _say(body: Body, _: ReceivedRequest) -> Body:
    return body


async def _no_such_function(received: ReceivedRequest) -> Body:
    return {"error": f"Function '{received.params['function']}' not available"}
