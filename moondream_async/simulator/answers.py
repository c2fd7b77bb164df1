"""Makes words of measurements.

No model runs here, and the answers say so. They hold what was measured and nothing
else: the same picture and the same question give the same words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from moondream_async.types import Length

from .pixels import COLOURS, Area, Picture

_TIMES = "\N{MULTIPLICATION SIGN}"  # a character of two bytes in every answer is a good test
_DISCLAIMER = "These are measurements by a simulator; no model has looked at the picture."
_SYNONYMS = {"gray": "grey", "violet": "purple", "turquoise": "cyan"}
_ABILITIES = (
    "size and format, brightness, the main colours, how many areas of a colour there are, "
    "and where a colour or the brightest part lies"
)


def name_colour(text: str) -> str | None:
    """Return the first colour that the text names, if any.

    >>> name_colour("the gray cat")
    'grey'
    """
    words = re.findall(r"[a-z]+", text.lower())
    return next(filter(COLOURS.__contains__, (_SYNONYMS.get(word, word) for word in words)), None)


def caption(picture: Picture, length: Length) -> str:
    """Describe a picture in one sentence, a few, or many."""
    others = [colour for colour in picture.shares if colour != picture.background][:4]
    summary = f"A {_describe_brightness(picture)} {_describe_size(picture)} picture, " + (
        f"mostly {picture.background}, with {_join(others)}."
        if others
        else f"{picture.background} all over."
    )
    if length == "short":
        return summary
    sentences = [summary, _describe_brightest(picture)]
    if length == "long":
        sentences.append(_describe_colours(picture))
        sentences += [_describe_area(area) for area in picture.areas[:8]]
        sentences.append(
            f"It arrived as {picture.file_bytes:,} bytes, "
            f"and its mean brightness is {picture.brightness:.2f} of 1."
        )
    return " ".join([*sentences, _DISCLAIMER])


def answer(
    pictures: Sequence[Picture], question: str, spatial_refs: Iterable[list[float]] = ()
) -> str:
    """Answer a question about each picture by measurements, or say that these can't answer it."""
    if not pictures:
        return (
            f"No picture came with this question, and a simulator can only measure: {_ABILITIES}."
        )
    if len(pictures) > 1:
        return " ".join(
            f"Picture {number}: {answer([picture], question)}"
            for number, picture in enumerate(pictures, 1)
        )
    (picture,) = pictures
    there = [
        f"At ({x:.2f}, {y:.2f}) it is {picture.colour_at(x, y)}."
        for x, y in map(_middle, spatial_refs)
    ]
    return " ".join([*there, _answer_question(picture, question)])


def think(pictures: Sequence[Picture], question: str) -> dict[str, Any]:
    """Return the reasoning that leads to the answer: a text, and the place each span names."""
    if not pictures:
        return {"text": "There is no picture to measure.", "grounding": []}
    picture = pictures[0]
    text = f"The question has {len(question.split())} words. I measure {_describe_size(picture)}."
    grounding = []
    for area in picture.areas[:4]:
        span = f"a {area.colour} area"
        start = len(text) + len(" I see ")
        point = [round(place, 3) for place in area.centre]
        grounding.append({"start_idx": start, "end_idx": start + len(span), "points": [point]})
        text += f" I see {span} at the {_describe_place(*area.centre)}."
    return {"text": text, "grounding": grounding}


def find_areas(picture: Picture, object: str, spatial_refs: list[list[float]]) -> list[Area]:
    """Return the areas of the colour that an object's description names.

    A description without a colour fits no area, unless it is as general as
    "shape" or "object": then it fits every area. Of the areas that fit, references
    choose the areas whose boxes they lie in.
    """
    colour = name_colour(object)
    if colour is None:
        general = re.search(r"\b(shape|object|thing|area|region)", object.lower())
        areas = picture.areas if general else []
    elif colour == picture.background:
        corners = [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)]
        areas = [Area(colour, 1.0, (0.0, 0.0, 1.0, 1.0), (0.5, 0.5), corners)]
    else:
        areas = [area for area in picture.areas if area.colour == colour]
    places = [_middle(reference) for reference in spatial_refs]
    return [area for area in areas if not places or any(map(area.holds, places))]


def _answer_question(picture: Picture, question: str) -> str:
    asked = question.lower()
    colour = name_colour(asked)
    fitting = [area for area in picture.areas if colour in (None, area.colour)]
    kind = colour or "coloured"
    presence = "" if colour is None else _describe_presence(picture, colour, fitting)
    places = "" if colour is None else " ".join(map(_describe_area, fitting[:4]))
    # The first pattern that a question has decides what the question is about.
    topics = {
        r"how many\b": (
            f"There is 1 {kind} area."
            if len(fitting) == 1
            else f"There are {len(fitting)} {kind} areas."
        ),
        r"where\b": places or presence or _locate_light(picture, asked),
        r"colou?r": _describe_colours(picture),
        r"(bright|dark|light)": (
            f"The picture is {_describe_brightness(picture)}: its mean brightness is "
            f"{picture.brightness:.2f} of 1. {_describe_brightest(picture)}"
        ),
        r"(size|large|big|dimension|resolution|wide|width|tall|height|format|file|pixel|byte)": (
            f"It is a {_describe_size(picture)} picture of {picture.file_bytes:,} bytes: "
            f"{picture.width} pixels wide and {picture.height} high."
        ),
    }
    for pattern, words in topics.items():
        if re.search(rf"\b{pattern}", asked):
            return words
    return presence or f"{caption(picture, 'normal')} You can ask for {_ABILITIES}."


def _locate_light(picture: Picture, asked: str) -> str:
    if "dark" in asked:
        return f"The darkest part is at the {_describe_place(*picture.darkest)}."
    if "bright" in asked or "light" in asked:
        return _describe_brightest(picture)
    return "I can only say where a colour, or the brightest or the darkest part, lies."


def _describe_presence(picture: Picture, colour: str, areas: list[Area]) -> str:
    if colour == picture.background:
        return f"Yes, {colour} covers most of the picture."
    if areas:
        return f"Yes. {_describe_area(areas[0])}"
    return f"No, I measure no {colour} area."


def _describe_colours(picture: Picture) -> str:
    shares = [f"{colour} ({share:.0%})" for colour, share in picture.shares.items()]
    return f"By area, the main colours are {_join(shares[:5])}."


def _describe_brightest(picture: Picture) -> str:
    if picture.brightest is None:
        return "It is equally bright everywhere."
    return f"The brightest part is at the {_describe_place(*picture.brightest)}."


def _describe_size(picture: Picture) -> str:
    return f"{picture.width}{_TIMES}{picture.height} {picture.format}"


def _describe_brightness(picture: Picture) -> str:
    if picture.brightness < 0.3:
        return "dark"
    return "bright" if picture.brightness > 0.7 else "medium-bright"


def _describe_area(area: Area) -> str:
    x, y = area.centre
    return (
        f"A {area.colour} area lies at the {_describe_place(x, y)}, around ({x:.2f}, {y:.2f}), "
        f"and covers {area.share:.1%} of the picture."
    )


def _middle(reference: list[float]) -> tuple[float, float]:
    left, top, right, bottom = (reference * 2)[:4]  # a point is a box without extent
    return (left + right) / 2, (top + bottom) / 2


def _describe_place(x: float, y: float) -> str:
    vertical = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    horizontal = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return " ".join(filter(None, (vertical, horizontal))) or "centre"


def _join(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
