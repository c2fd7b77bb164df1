"""The five skills: what was asked and what was measured in, an answer out.

Pure and quick. The pictures have been measured before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic

import msgspec

from . import answers
from .dialects import Answer, Body
from .pixels import Area, Picture
from .validation import BodyT, CaptionBody, ObjectBody, QueryBody, SkillBody

_DEFAULT_MAX_OBJECTS = 150
_COARSE_POINTS = 12


class Skill(msgspec.Struct, Generic[BodyT], frozen=True):
    """A skill: the body it takes, and how it is done."""

    body: type[BodyT]
    solve: Callable[[BodyT, Picture | None], Answer]
    streams: bool = False


def _caption(body: CaptionBody, picture: Picture | None) -> Answer:
    text = answers.caption(picture, body.length) if picture else ""
    return _answer_in_words("caption", "caption", text, body)


def _query(body: QueryBody, picture: Picture | None) -> Answer:
    text = answers.answer(picture, body.question, body.spatial_refs or [])
    answer = _answer_in_words("query", "answer", text, body)
    answer.question_words = len(body.question.split())
    answer.has_image = picture is not None
    if body.reasoning:
        answer.reasoning = answers.think(picture, body.question)
    return answer


def _detect(body: ObjectBody, picture: Picture | None) -> Answer:
    boxes = [_name_sides(area.box) for area in _find(body, picture)]
    return Answer(skill="detect", result={"objects": boxes}, tokens=4 * len(boxes))


def _point(body: ObjectBody, picture: Picture | None) -> Answer:
    points = [
        {"x": round(area.centre[0], 4), "y": round(area.centre[1], 4)}
        for area in _find(body, picture)
    ]
    return Answer(skill="point", result={"points": points}, tokens=2 * len(points))


def _segment(body: ObjectBody, picture: Picture | None) -> Answer:
    """Outline the largest area that fits: its coarse outline in pieces, and the refined one."""
    found = _find(body, picture)
    if not found:
        return Answer(skill="segment", result={"path": "", "bbox": None})
    outline = _relate_to_box(found[0])
    coarse = outline[:: max(1, len(outline) // _COARSE_POINTS)]
    pieces = answers.split_words(_draw_path(coarse))[: body.max_tokens]
    result = {"path": _draw_path(outline), "bbox": _name_sides(found[0].box)}
    return Answer(skill="segment", result=result, pieces=pieces, tokens=len(pieces))


SKILLS: dict[str, Skill[Any]] = {
    "caption": Skill(CaptionBody, _caption, streams=True),
    "query": Skill(QueryBody, _query, streams=True),
    "detect": Skill(ObjectBody, _detect),
    "point": Skill(ObjectBody, _point),
    "segment": Skill(ObjectBody, _segment, streams=True),
}


def _answer_in_words(skill: str, key: str, text: str, body: SkillBody) -> Answer:
    words = answers.split_words(text)
    kept = words[: body.max_tokens]
    return Answer(
        skill=skill,
        result={key: "".join(kept)},
        pieces=kept,
        tokens=len(kept),
        finish_reason="stop" if len(kept) == len(words) else "length",
    )


def _find(body: ObjectBody, picture: Picture | None) -> list[Area]:
    if picture is None:
        return []
    limit = (body.settings and body.settings.max_objects) or _DEFAULT_MAX_OBJECTS
    return answers.find_areas(picture, body.object, body.spatial_refs or [])[:limit]


def _name_sides(box: tuple[float, float, float, float]) -> Body:
    names = ("x_min", "y_min", "x_max", "y_max")
    return {name: round(side, 4) for name, side in zip(names, box, strict=True)}


def _relate_to_box(area: Area) -> list[tuple[float, float]]:
    """Return the outline's corners, 0-1 of the area's box."""
    left, top, right, bottom = area.box
    points = [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in area.outline]
    return [
        point
        for before, point, after in zip(
            points[-1:] + points[:-1], points, points[1:] + points[:1], strict=True
        )
        if not _lies_between(before, point, after)
    ]


def _lies_between(
    before: tuple[float, float], point: tuple[float, float], after: tuple[float, float]
) -> bool:
    """Whether the three are on one horizontal or vertical line: the outline has no other."""
    return before[0] == point[0] == after[0] or before[1] == point[1] == after[1]


def _draw_path(points: list[tuple[float, float]]) -> str:
    """Write an SVG path as the API does.

    >>> _draw_path([(0, 0), (1, 0.5), (0.25, 1)])
    'M 0 0 L 1 0.5 L 0.25 1 Z'
    """
    return "M " + " L ".join(f"{x:.3g} {y:.3g}" for x, y in points) + " Z"
