"""Answers that a test wants, in place of those that the simulator measures.

A script has a method for each skill, named as the client's call is::

    async with Simulator() as simulator:
        simulator.script.caption("A red circle.")
        simulator.script.query("Two.", reasoning="I count them.")
        simulator.script.detect([(0.1, 0.2, 0.5, 0.6)])
        simulator.script.caption(fault="status=503,retry_after=1")
        held = simulator.script.chat(["A red", " circle."], hold_after=1)

Each answers the next request to its skill that is let in, in the order in which they
were scripted. Requests for which nothing is scripted are answered as ever.

A script may be written, and what it holds released, from any thread.
"""

from __future__ import annotations

import reprlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from moondream_async.results import Point, Reasoning, Region

from .answers import split_words
from .dialects import Answer, Body
from .faults import Fault
from .steps import Event, Hold, Steps

Text = str | Sequence[str]
"""A text, or the pieces that it is streamed in."""

_Place = Point | Region | Mapping[str, float] | Sequence[float]


class ScriptedAnswer:
    """An answer in a script: made by the methods of `Script`, and continued here.

    Attributes:
        skill: Which requests it answers.
        answer: What it says; None is what the simulator measures.
        times: How many more requests it answers; None is all that find no other.
        fault: What goes wrong with it, if anything.
        hold_after: After how many pieces it is held, if at all.
    """

    def __init__(
        self,
        skill: str,
        answer: Answer | None,
        *,
        times: int | None,
        fault: Fault | None,
        hold_after: int | None,
        on_change: Callable[[], object],
    ) -> None:
        self.skill = skill
        self.answer = answer
        self.times = times
        self.fault = fault
        self.hold_after = hold_after
        self._on_change = on_change
        self._released = False

    def release(self) -> None:
        """Let what is held go on, and hold no later answer either. From any thread."""
        self._released = True
        self._on_change()

    def begin(self) -> Answer | None:
        """Return the answer for a request that comes in now."""
        if self.answer is None:
            return None
        now = time.perf_counter()
        return msgspec.structs.replace(self.answer, received=now, ready=now)

    def hold(self) -> Iterator[Hold]:
        """Yield what comes before a plain answer, which is held as a whole."""
        if self.hold_after is not None:
            yield Hold(lambda: self._released)

    def pause(self, steps: Steps) -> Steps:
        """Yield the steps of a stream, and a hold where enough pieces are out."""
        pieces, held = 0, False
        for step in steps:
            if not held and self.hold_after is not None and pieces >= self.hold_after:
                held = True
                yield from self.hold()
            yield step
            pieces += step.tokens if isinstance(step, Event) else 0

    def __repr__(self) -> str:
        parts = []
        if self.answer is not None:
            [first, *_] = self.answer.result.values()
            parts.append(reprlib.repr(first))
        if self.fault is not None:
            parts.append(f"fault={str(self.fault)!r}")
        if self.times != 1:
            parts.append(f"times={self.times}")
        return f"{self.skill}({', '.join(parts)})"


class Script:
    """The scripted answers to come.

    What its methods have in common:

    - They return the `ScriptedAnswer`; nobody needs it who holds nothing.
    - A text that is a list of pieces is streamed in just those, an event each. A text in
      one is streamed word by word, as the dialect does it. Nothing given is the
      answer that the simulator measures. Pictures are not looked at for any other.
    - `times` is how many requests it answers. None is every one for which nothing else
      is scripted; the latest of that kind stands.
    - `fault` goes wrong with this answer: see `Fault`. A fault of the simulator's own
      `faults` that strikes the same request comes before it; one that answers in
      place of the right answer leaves the scripted one to the next request.
    - `hold_after` stops the stream when so many pieces are out, until `release`; 0 is
      before the first. A plain answer is held as a whole.
    - They raise `ValueError` for a skill that the dialect doesn't serve, a fault that isn't
      known, or a number that can't be.

    Lines of batches and rollouts of tuning are not scripted.
    """

    def __init__(
        self, skills: Collection[str] = (), on_change: Callable[[], object] = lambda: None
    ) -> None:
        self._skills = skills
        self._on_change = on_change
        self._lock = threading.Lock()
        self._waiting: list[ScriptedAnswer] = []

    def caption(
        self,
        text: Text | None = None,
        *,
        finish_reason: str = "stop",
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Answer a caption with this text."""
        answer = None
        if text is not None:
            answer = _say("caption", "caption", text, finish_reason)
        return self._add("caption", answer, times, fault, hold_after)

    def query(
        self,
        text: Text | None = None,
        *,
        reasoning: str | Reasoning | None = None,
        finish_reason: str = "stop",
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Answer a question with this text, and this reasoning whether it was asked for or not."""
        answer = None
        if text is not None:
            answer = _say("query", "answer", text, finish_reason)
            if isinstance(reasoning, str):
                reasoning = Reasoning(reasoning)
            answer.reasoning = msgspec.to_builtins(reasoning)
        return self._add("query", answer, times, fault, hold_after)

    def detect(
        self,
        objects: Iterable[_Place] | None = None,
        *,
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Find these boxes: each a `Region`, or x_min, y_min, x_max and y_max."""
        answer = None
        if objects is not None:
            boxes = [_name_sides(box, Region) for box in objects]
            answer = Answer(skill="detect", result={"objects": boxes}, tokens=4 * len(boxes))
        return self._add("detect", answer, times, fault, hold_after)

    def point(
        self,
        points: Iterable[_Place] | None = None,
        *,
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Find these places: each a `Point`, or x and y."""
        answer = None
        if points is not None:
            places = [_name_sides(place, Point) for place in points]
            answer = Answer(skill="point", result={"points": places}, tokens=2 * len(places))
        return self._add("point", answer, times, fault, hold_after)

    def segment(
        self,
        path: str | None = None,
        bbox: _Place | None = None,
        *,
        coarse_path: Text | None = None,
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Outline an object with this path, 0-1 of this box.

        `coarse_path` is what a stream brings before the path itself; the same where
        it isn't given.
        """
        answer = None
        if path is not None:
            answer = _say("segment", "path", coarse_path or path, "stop")
            box = None if bbox is None else _name_sides(bbox, Region)
            answer.result = {"path": path, "bbox": box}
        return self._add("segment", answer, times, fault, hold_after)

    def chat(
        self,
        text: Text | None = None,
        *,
        reasoning: str | None = None,
        finish_reason: str = "stop",
        times: int | None = 1,
        fault: Fault | str | None = None,
        hold_after: int | None = None,
    ) -> ScriptedAnswer:
        """Answer a conversation with this text. Words of the reasoning are pieces too."""
        answer = None
        if text is not None:
            answer = _say("chat", "content", text, finish_reason)
            answer.reasoning = {"text": reasoning} if reasoning else None
        return self._add("chat", answer, times, fault, hold_after)

    @property
    def unused(self) -> list[ScriptedAnswer]:
        """The answers that requests have yet to take, without those for any number of them."""
        return [answer for answer in self if answer.times is not None]

    def clear(self) -> None:
        """Forget all answers that no request has taken yet."""
        with self._lock:
            self._waiting.clear()

    def take(self, skill: str) -> ScriptedAnswer | None:
        """Return the answer for a request, and count it as taken."""
        with self._lock:
            fitting = [answer for answer in self._waiting if answer.skill == skill]
            for answer in fitting:
                if answer.times is not None:
                    answer.times -= 1
                    if answer.times == 0:
                        self._waiting.remove(answer)
                    return answer
            return fitting[-1] if fitting else None

    def __iter__(self) -> Iterator[ScriptedAnswer]:
        return iter(tuple(self._waiting))

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"Script({self._waiting})"

    def _add(
        self,
        skill: str,
        answer: Answer | None,
        times: int | None,
        fault: Fault | str | None,
        hold_after: int | None,
    ) -> ScriptedAnswer:
        if skill not in self._skills:
            raise ValueError(f"this dialect has no {skill}; it has {', '.join(self._skills)}")
        if times is not None and times < 1:
            raise ValueError(f"times is 1 or more, or None for all, not {times}")
        if hold_after is not None and hold_after < 0:
            raise ValueError(f"hold_after is 0 or more, not {hold_after}")
        if isinstance(fault, str):
            fault = Fault.parse(fault)
        if fault is not None and fault.times != 1:
            raise ValueError("how often it goes wrong is said by the answer's times")
        scripted = ScriptedAnswer(
            skill,
            answer,
            times=times,
            fault=fault,
            hold_after=hold_after,
            on_change=self._on_change,
        )
        with self._lock:
            self._waiting.append(scripted)
        return scripted


def _say(skill: str, key: str, text: Text, finish_reason: str) -> Answer:
    pieces = split_words(text) if isinstance(text, str) else list(text)
    return Answer(
        skill=skill,
        result={key: "".join(pieces)},
        pieces=pieces,
        piece_by_piece=not isinstance(text, str),
        tokens=len(pieces),
        finish_reason=finish_reason,
    )


def _name_sides(place: Any, kind: type[Point | Region]) -> Body:
    """Return a place as the API sends it.

    >>> _name_sides((0, 0.5), Point)
    {'x': 0.0, 'y': 0.5}
    """
    names = kind.fields()
    named = isinstance(place, (kind, Mapping))
    sides = dict(place) if named else dict(zip(names, place, strict=True))
    if sides.keys() != set(names):
        raise ValueError(f"a place has {', '.join(names)}, not {', '.join(sides)}")
    return {name: float(sides[name]) for name in names}
