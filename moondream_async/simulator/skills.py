"""The skills and their endpoints, the list of models, and the server's health."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Generic

import msgspec

from . import answers
from .dialects import MODELS, Dialect
from .pixels import Area, Picture, look
from .received import ReceivedRequest
from .steps import Answer, Body, Route, Steps, say, split_words
from .validation import BodyT, CaptionBody, ObjectBody, QueryBody, RefusedError, read_body

_DEFAULT_MAX_OBJECTS = 150
_COARSE_POINTS = 12
_STATION_FIELDS = ("image_url", "question", "object", "length", "settings")


class Skill(msgspec.Struct, Generic[BodyT], frozen=True):
    """A skill: the type of its body, and the function that answers it from measurements."""

    body: type[BodyT]
    measure: Callable[[BodyT, list[Picture]], Answer]
    streams: bool = False

    def answer(self, body: BodyT, *more_images: str) -> Answer:
        """Answer a request about its picture, and about more of them. Blocks.

        Raises:
            RefusedError: A picture can't be read.
        """
        images = [image for image in (body.image_url, *more_images) if image]
        return self.measure(body, [look(image) for image in images])


def _caption(body: CaptionBody, pictures: list[Picture]) -> Answer:
    return say("caption", "caption", answers.caption(pictures[0], body.length), body.max_tokens)


def _query(body: QueryBody, pictures: list[Picture]) -> Answer:
    text = answers.answer(pictures, body.question, body.spatial_refs or [])
    answer = say("query", "answer", text, body.max_tokens)
    answer.input_tokens = 6 + len(body.question.split()) + 729 * len(pictures)
    if body.reasoning:
        answer.reasoning = answers.think(pictures, body.question)
    return answer


def _detect(body: ObjectBody, pictures: list[Picture]) -> Answer:
    boxes = [_name_sides(area) for area in _find(body, pictures)]
    return Answer(skill="detect", result={"objects": boxes})


def _point(body: ObjectBody, pictures: list[Picture]) -> Answer:
    centres = [area.centre for area in _find(body, pictures)]
    points = [{"x": round(x, 4), "y": round(y, 4)} for x, y in centres]
    return Answer(skill="point", result={"points": points})


def _segment(body: ObjectBody, pictures: list[Picture]) -> Answer:
    """Outline the largest area that fits: the coarse outline in pieces, and the refined one."""
    found = _find(body, pictures)
    if not found:
        return Answer(skill="segment", result={"path": "", "bbox": None})
    outline = _relate_to_box(found[0])
    coarse = outline[:: max(1, len(outline) // _COARSE_POINTS)]
    pieces = split_words(_draw_path(coarse))[: body.max_tokens]
    result = {"path": _draw_path(outline), "bbox": _name_sides(found[0])}
    return Answer(skill="segment", result=result, pieces=pieces)


SKILLS: dict[str, Skill[Any]] = {
    "caption": Skill(CaptionBody, _caption, streams=True),
    "query": Skill(QueryBody, _query, streams=True),
    "detect": Skill(ObjectBody, _detect),
    "point": Skill(ObjectBody, _point),
    "segment": Skill(ObjectBody, _segment, streams=True),
}


class Endpoints:
    """The skills of a dialect, its list of models, and its health."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._answered = 0

    def routes(self) -> list[Route]:
        """Return the endpoints of the dialect."""
        dialect, prefix = self._dialect, self._dialect.prefix
        # Station takes any method, and paths with and without its prefix.
        method, starts = ("*", (prefix, "")) if dialect.lenient else ("POST", (prefix,))
        routes = [
            Route("GET", path, lambda _: dialect.health, "none") for path in ("/health", "/healthz")
        ]
        if dialect.hosted or dialect.lenient:
            routes.append(Route("GET", f"{prefix}/models", lambda _: dialect.models(), "optional"))
        for start in starts:
            for name in dialect.skills:
                answer = partial(self._answer, name)
                routes.append(Route(method, f"{start}/{name}", answer, skill=name))
        if dialect.lenient:
            routes.append(Route("GET", f"{prefix}/stats", self._stats))
            routes += [Route(method, f"{start}/{{name}}", _no_such_function) for start in starts]
        return routes

    async def _answer(self, name: str, received: ReceivedRequest) -> Body | Steps:
        started = time.perf_counter()
        skill, dialect = SKILLS[name], self._dialect
        needs_image = name != "query" or not dialect.text_only
        body = read_body(self._given(received), skill.body, needs_image=needs_image)
        stream = received.stream and skill.streams
        if stream and getattr(body, "reasoning", False) and not dialect.streams_reasoning:
            raise RefusedError("Streaming is not supported when reasoning is enabled")
        answer: Answer = await received.find(skill.answer, body)
        self._answered += 1
        answer = msgspec.structs.replace(
            answer, number=self._answered, received=started, ready=time.perf_counter()
        )
        return dialect.events(answer) if stream else dialect.body(answer)

    def _given(self, received: ReceivedRequest) -> Any:
        """Return the body, as Station reads it: a blank field is absent, any value a boolean."""
        body = received.body
        if not self._dialect.lenient:
            return body
        given = {name: body[name] for name in _STATION_FIELDS if body.get(name)}
        return given | {name: bool(body.get(name)) for name in ("stream", "reasoning")}

    def _stats(self, _: ReceivedRequest) -> Body:
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


def _find(body: ObjectBody, pictures: list[Picture]) -> list[Area]:
    limit = (body.settings and body.settings.max_objects) or _DEFAULT_MAX_OBJECTS
    return answers.find_areas(pictures[0], body.object, body.spatial_refs or [])[:limit]


def _name_sides(area: Area) -> Body:
    sides = zip(("x_min", "y_min", "x_max", "y_max"), area.box, strict=True)
    return {name: round(side, 4) for name, side in sides}


def _relate_to_box(area: Area) -> list[tuple[float, float]]:
    """Return the outline's corners, 0-1 of the area's box."""
    left, top, right, bottom = area.box
    points = [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in area.outline]
    befores, afters = points[-1:] + points[:-1], points[1:] + points[:1]
    # A point between two others on a horizontal or vertical line is no corner.
    return [
        (x, y)
        for (x, y), before, after in zip(points, befores, afters, strict=True)
        if not before[0] == x == after[0] and not before[1] == y == after[1]
    ]


def _draw_path(points: list[tuple[float, float]]) -> str:
    """Write an SVG path as the API does.

    >>> _draw_path([(0, 0), (1, 0.5), (0.25, 1)])
    'M 0 0 L 1 0.5 L 0.25 1 Z'
    """
    return "M " + " L ".join(f"{x:.3g} {y:.3g}" for x, y in points) + " Z"


def _no_such_function(received: ReceivedRequest) -> Body:
    return {"error": f"Function '{received.params['name']}' not available"}
