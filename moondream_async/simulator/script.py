"""Answers that a test wants, in place of the answers that the simulator measures.

A script has a method for each skill, named as the client's call is::

    async with Simulator() as simulator:
        simulator.script.caption("A red circle.")
        simulator.script.query("Two.", reasoning="I count them.")
        simulator.script.detect([(0.1, 0.2, 0.5, 0.6)])
        simulator.script.caption(fault="status=503,retry_after=1")
        held = simulator.script.chat(["A red", " circle."], hold_after=1)

An answer is for the next request to its skill that the server accepts, in the order of
the script. A request without a scripted answer gets a measured one.

All methods may be called from any thread.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import msgspec

from moondream_async.results import Point, Reasoning, Region

from .faults import Fault
from .steps import Answer, Body, Event, Hold, Queue, Steps, say

Text = str | Sequence[str]
"""A text, or the pieces to stream it in."""

_Place = Point | Region | Mapping[str, float] | Sequence[float]


class Terms(TypedDict, total=False):
    """The arguments that all methods of `Script` have in common; `Script` describes them."""

    times: int | None
    fault: Fault | str | None
    hold_after: int | None


class ScriptedAnswer:
    """An answer in a script: made by the methods of `Script`, and released here.

    Attributes:
        skill: The skill of the requests that it answers.
        answer: The answer; None is the simulator's measurement.
        times: The number of requests that it still answers; None is any number.
        fault: What goes wrong with it, if anything.
        hold_after: The number of pieces before it is held, if it is.
    """

    def __init__(
        self,
        skill: str,
        answer: Answer | None,
        on_change: Callable[[], object],
        *,
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> None:
        if times is not None and times < 1:
            raise ValueError(f"times is 1 or more, or None for all, not {times}")
        if hold_after is not None and hold_after < 0:
            raise ValueError(f"hold_after is 0 or more, not {hold_after}")
        self.skill = skill
        self.answer = answer
        self.times = times
        self.fault = Fault.parse(fault) if isinstance(fault, str) else fault
        self.hold_after = hold_after
        self._on_change = on_change
        self._released = False
        if self.fault is not None and self.fault.times != 1:
            raise ValueError("how often it goes wrong is said by the answer's times")

    def release(self) -> None:
        """Continue the answers held now, and hold no later one. From any thread."""
        self._released = True
        self._on_change()

    def hold(self) -> Iterator[Hold]:
        """Yield the hold of a plain answer, which is held as a whole."""
        if self.hold_after is not None:
            yield Hold(lambda: self._released)

    def pause(self, steps: Steps) -> Steps:
        """Yield the steps of a stream, with a hold after `hold_after` pieces."""
        pieces = 0
        for step in steps:
            if pieces >= (self.hold_after or 0):
                yield from self.hold()  # once it is released, no hold lasts
            yield step
            pieces += step.tokens if isinstance(step, Event) else 0

    def __repr__(self) -> str:
        parts = []
        if self.answer is not None:
            parts.append(reprlib.repr(next(iter(self.answer.result.values()))))
        if self.fault is not None:
            parts.append(f"fault={str(self.fault)!r}")
        if self.times != 1:
            parts.append(f"times={self.times}")
        return f"{self.skill}({', '.join(parts)})"


class Script(Queue[ScriptedAnswer]):
    """The scripted answers to come.

    All methods return the `ScriptedAnswer`, whose `release` ends a hold. Without an answer
    in the arguments, the simulator measures it; for a scripted answer, pictures are not
    decoded. A list of pieces is streamed as it is, an event each; a text is streamed as the
    dialect does it, word by word. All methods take these arguments:

    - `times`: The number of requests that the answer is for, 1 by default. None is every
      request for which nothing else is scripted; the latest such answer counts.
    - `fault`: Goes wrong with this answer: see `Fault`. A fault in the simulator's own
      `faults` that strikes the same request comes first; if it replies in place of the
      right answer, the scripted answer waits for the next request.
    - `hold_after`: Holds the stream after so many pieces, until `release`; 0 is before the
      first. A plain answer is held as a whole.

    They raise `ValueError` for a skill that the dialect doesn't serve, an unknown fault, or
    a number out of range. Lines of batches and rollouts of tuning are not scripted.
    """

    def __init__(
        self, skills: Collection[str] = (), on_change: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__()
        self._skills = skills
        self._on_change = on_change

    def caption(
        self, text: Text | None = None, *, finish_reason: str = "stop", **terms: Unpack[Terms]
    ) -> ScriptedAnswer:
        """Answer a caption with this text."""
        return self._say("caption", "caption", text, terms, finish_reason=finish_reason)

    def query(
        self,
        text: Text | None = None,
        *,
        reasoning: str | Reasoning | None = None,
        finish_reason: str = "stop",
        **terms: Unpack[Terms],
    ) -> ScriptedAnswer:
        """Answer a question with this text and this reasoning, whether or not it was asked for."""
        if isinstance(reasoning, str):
            reasoning = Reasoning(reasoning)
        more = {"finish_reason": finish_reason, "reasoning": msgspec.to_builtins(reasoning)}
        return self._say("query", "answer", text, terms, **more)

    def detect(
        self, objects: Iterable[_Place] | None = None, **terms: Unpack[Terms]
    ) -> ScriptedAnswer:
        """Find these boxes: each a `Region`, or x_min, y_min, x_max and y_max."""
        return self._place("detect", "objects", objects, terms, Region)

    def point(
        self, points: Iterable[_Place] | None = None, **terms: Unpack[Terms]
    ) -> ScriptedAnswer:
        """Find these places: each a `Point`, or x and y."""
        return self._place("point", "points", points, terms, Point)

    def segment(
        self,
        path: str | None = None,
        bbox: _Place | None = None,
        *,
        coarse_path: Text | None = None,
        **terms: Unpack[Terms],
    ) -> ScriptedAnswer:
        """Outline an object with this path, 0-1 of this box.

        A stream brings `coarse_path` before the path itself; None is the path.
        """
        box = None if bbox is None else _name_sides(bbox, Region)
        pieces = None if path is None else coarse_path or path
        return self._say("segment", "path", pieces, terms, result={"path": path, "bbox": box})

    def chat(
        self,
        text: Text | None = None,
        *,
        reasoning: str | None = None,
        finish_reason: str = "stop",
        **terms: Unpack[Terms],
    ) -> ScriptedAnswer:
        """Answer a conversation with this text. Words of the reasoning are pieces too."""
        thought = {"text": reasoning} if reasoning else None
        more = {"finish_reason": finish_reason, "reasoning": thought}
        return self._say("chat", "content", text, terms, **more)

    def take(self, skill: str) -> ScriptedAnswer | None:
        """Return the answer for a request, and count it as taken."""
        with self._lock:
            fitting = [answer for answer in self._waiting if answer.skill == skill]
            for answer in fitting:
                if answer.times is not None:
                    answer.times -= 1
                    self._waiting = [each for each in self._waiting if each.times != 0]
                    return answer
            return fitting[-1] if fitting else None

    def _say(
        self, skill: str, key: str, text: Text | None, terms: Terms, **more: Any
    ) -> ScriptedAnswer:
        answer = None
        if isinstance(text, str):
            answer = say(skill, key, text)
        elif text is not None:
            pieces = list(text)
            result = {key: "".join(pieces)}
            answer = Answer(skill=skill, result=result, pieces=pieces, piece_by_piece=True)
        return self._queue(skill, answer and msgspec.structs.replace(answer, **more), terms)

    def _place(
        self,
        skill: str,
        key: str,
        places: Iterable[_Place] | None,
        terms: Terms,
        kind: type[Point | Region],
    ) -> ScriptedAnswer:
        answer = None
        if places is not None:
            answer = Answer(skill=skill, result={key: [_name_sides(at, kind) for at in places]})
        return self._queue(skill, answer, terms)

    def _queue(self, skill: str, answer: Answer | None, terms: Terms) -> ScriptedAnswer:
        if skill not in self._skills:
            raise ValueError(f"this dialect has no {skill}; it has {', '.join(self._skills)}")
        scripted = ScriptedAnswer(skill, answer, self._on_change, **terms)
        self._add(scripted)
        return scripted


def _name_sides(place: Any, kind: type[Point | Region]) -> Body:
    """Return a place as the API sends it.

    >>> _name_sides((0, 0.5), Point)
    {'x': 0.0, 'y': 0.5}
    """
    names = kind.fields()
    sides = dict(place if isinstance(place, Mapping) else zip(names, place, strict=True))
    if sides.keys() != set(names):
        raise ValueError(f"a place has {', '.join(names)}, not {', '.join(sides)}")
    return {name: float(sides[name]) for name in names}
