"""Ways in which a server can fail, on demand.

A fault is a short text, as ``cut=3`` or ``status=429,retry_after=1,times=2``.
It holds one or more effects, and options that say when it strikes. The effects
are the functions below: to add one, write one. What each does is said where it
is declared, and `describe_faults` prints the lot.

There are three kinds of effect:

- instead: another answer takes the place of the right one;
- before: something happens before the answer begins;
- on steps: the events of a streamed answer are made worse. A fault with such
  an effect strikes only requests that ask for a stream.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

from .steps import Event, HangUp, Reply, Step, Steps, Wait

Kind = Literal["instead", "before", "on_steps"]


class Effect(msgspec.Struct, frozen=True):
    """One way to fail, and how its value is written."""

    name: str
    kind: Kind
    value: str
    """What stands after the equals sign, as the help prints it; "" for nothing."""
    help: str
    parse: Callable[[str], Any]
    default: Any
    """The value where none is given; `_REQUIRED` where one must be."""
    apply: Callable[..., Any]


_REQUIRED = object()
EFFECTS: dict[str, Effect] = {}
OPTIONS = {
    "times": "N or always: how many requests it strikes; 1 unless told",
    "path": "TEXT: strikes only requests whose path contains this",
    "retry_after": "VALUE: sends the header Retry-After with a status",
}

_Function = Callable[..., Any]


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _reset_only(text: str) -> str:
    if text != "reset":
        raise ValueError
    return text


def _effect(
    kind: Kind,
    name: str,
    help: str,  # noqa: A002 - argparse's and typer's word for it
    *,
    value: str = "",
    parse: Callable[[str], Any] = _count,
    default: Any = _REQUIRED,
) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        EFFECTS[name] = Effect(name, kind, value, help, parse, default, function)
        return function

    return register


@_effect("instead", "status", "answers with this HTTP status", value="CODE")
def _status(code: int) -> Reply:
    return Reply(code)


@_effect("instead", "html", "answers with a gateway's HTML page", value="[CODE]", default=502)
def _html(code: int) -> Reply:
    page = f"<html><head><title>{code}</title></head><body>Error {code}</body></html>"
    return Reply(code, page, content_type="text/html")


@_effect("instead", "reject", "answers that the queue is full, with status 200", default=None)
def _reject(_: None) -> Reply:
    return Reply(200, {"error": "Queue is full", "status": "rejected"})


@_effect(
    "instead",
    "redirect",
    "redirects there with status 307, or to CODE:URL with another",
    value="URL",
    parse=str,
)
def _redirect(target: str) -> Reply:
    code, colon, url = target.partition(":")
    status, url = (int(code), url) if colon and code.isdigit() else (307, target)
    return Reply(status, "", headers={"Location": url})


@_effect("before", "slow_start", "waits before it answers at all", value="SECONDS", parse=float)
def _slow_start(seconds: float) -> Step:
    return Wait(seconds)


@_effect(
    "before",
    "hang_up",
    "closes the connection instead of answering",
    value="[reset]",
    parse=_reset_only,
    default="",
)
def _hang_up(how: str) -> Step:
    return HangUp(reset=how == "reset")


@_effect("on_steps", "json", "answers with a JSON body although a stream was asked", default=None)
def _json(steps: Steps, _: None) -> Steps:
    return steps  # the server looks for this one by name


@_effect(
    "on_steps", "cut", "ends the body in good order after N events, without the last", value="N"
)
def _cut(steps: Steps, count: int) -> Steps:
    return _first_events(steps, count)


@_effect("on_steps", "drop", "closes the connection after N events", value="N")
def _drop(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield HangUp()


@_effect("on_steps", "reset", "resets the connection after N events", value="N")
def _reset(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield HangUp(reset=True)


@_effect("on_steps", "cut_inside", "closes it in the middle of event N", value="N")
def _cut_inside(steps: Steps, number: int) -> Steps:
    yield from _until_inside(steps, number)
    yield HangUp()


@_effect("on_steps", "stall", "sends nothing more after N events", value="N")
def _stall(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield Wait(None)


@_effect("on_steps", "stall_inside", "sends nothing more from the middle of event N", value="N")
def _stall_inside(steps: Steps, number: int) -> Steps:
    yield from _until_inside(steps, number)
    yield Wait(None)


@_effect("on_steps", "error_event", "sends an event with an error after N events", value="N")
def _error_event(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield Event(b'data: {"error": {"message": "Inference failed", "type": "server_error"}}\n\n')


@_effect("on_steps", "named_error", "likewise, as an SSE event named error", value="N")
def _named_error(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield Event(b'event: error\ndata: {"message": "Inference failed"}\n\n')


@_effect("on_steps", "bad_json", "sends an event that is not JSON after N events", value="N")
def _bad_json(steps: Steps, count: int) -> Steps:
    yield from _first_events(steps, count)
    yield Event(b'data: {"chunk": \n\n')
    yield from steps


@_effect("on_steps", "big_event", "begins with a line of so many bytes", value="BYTES")
def _big_event(steps: Steps, size: int) -> Steps:
    yield Event(b'data: {"chunk": "' + b"x" * size)
    yield Event(b'", "completed": false}\n\n')
    yield from steps


@_effect(
    "on_steps",
    "heartbeats",
    "sends a comment before every event, and one each so many seconds while it stalls",
    value="[SECONDS]",
    parse=float,
    default=0.05,
)
def _heartbeats(steps: Steps, seconds: float) -> Steps:
    for step in steps:
        yield Event(b": ping\n\n")
        while isinstance(step, Wait) and step.seconds is None:
            yield Wait(seconds)
            yield Event(b": ping\n\n")
        yield step


@_effect("on_steps", "endless", "says the same again and again and never completes", default=None)
def _endless(steps: Steps, _: None) -> Steps:
    told = [step for step in steps if isinstance(step, Event) and not step.last]
    return itertools.cycle(told)


@_effect("on_steps", "split", "sends every event in pieces of so many bytes", value="BYTES")
def _split(steps: Steps, size: int) -> Steps:
    for step in steps:
        if isinstance(step, Event):
            for start in range(0, len(step.data), size):
                yield Event(step.data[start : start + size], step.tokens if start == 0 else 0)
        else:
            yield step


def _first_events(steps: Steps, count: int) -> Steps:
    """Yield steps up to the `count`-th event, and leave the rest in the iterator."""
    return itertools.islice(steps, count)


def _until_inside(steps: Steps, number: int) -> Steps:
    """Yield the events before the `number`-th, and half of that."""
    yield from _first_events(steps, number - 1)
    for step in itertools.islice(steps, 1):
        if isinstance(step, Event):
            yield Event(step.data[: len(step.data) // 2], step.tokens)


class Fault(msgspec.Struct, frozen=True):
    """What goes wrong, for which requests, and how often.

    Effects act in the order in which they are given: ``stall=3,heartbeats`` is a
    stream that stalls after three events and sends comments from then on.
    """

    effects: tuple[tuple[str, Any], ...]
    """Names and values."""
    times: int | None = 1
    """How many requests it strikes; None is all of them."""
    path: str = ""
    """Strikes only requests whose path contains this."""
    retry_after: str | None = None
    """The value of ``Retry-After``, sent with a status."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read a fault as it is written on a command line.

        Raises:
            ValueError: It is not of the known ones; the message lists those.

        >>> Fault.parse("status=429,retry_after=1,times=2")
        Fault(effects=(('status', 429),), times=2, path='', retry_after='1')
        """
        effects: list[tuple[str, Any]] = []
        options: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if name == "times":
                options[name] = None if value == "always" else _read(name, "=N", _positive, value)
            elif name in OPTIONS:
                options[name] = value
            elif name in EFFECTS:
                effect = EFFECTS[name]
                if equals and effect.value:
                    effects.append((name, _read(name, _usage(effect), effect.parse, value)))
                elif effect.default is not _REQUIRED and not equals:
                    effects.append((name, effect.default))
                else:
                    raise ValueError(f"fault {part!r} is written {name}{_usage(effect)}")
            else:
                raise ValueError(f"unknown fault {name!r}; known are {_list_effects()}")
        if not effects:
            raise ValueError(f"no fault in {text!r}; known are {_list_effects()}")
        return cls(tuple(effects), **options)

    def __str__(self) -> str:
        """Return the text that `parse` reads.

        >>> str(Fault.parse("html,retry_after=1,times=always"))
        'html,times=always,retry_after=1'
        """
        parts = [
            name if value == EFFECTS[name].default else f"{name}={value}"
            for name, value in self.effects
        ]
        if self.times != 1:
            parts.append(f"times={self.times or 'always'}")
        if self.path:
            parts.append(f"path={self.path}")
        if self.retry_after is not None:
            parts.append(f"retry_after={self.retry_after}")
        return ",".join(parts)

    def matches(self, path: str, *, stream: bool) -> bool:
        """Whether it strikes a request to `path` that does, or does not, ask for a stream."""
        for_streams = any(EFFECTS[name].kind == "on_steps" for name, _ in self.effects)
        return self.path in path and (stream or not for_streams)

    def has(self, name: str) -> bool:
        """Whether the named effect is one of its effects."""
        return any(effect == name for effect, _ in self.effects)

    def before(self) -> Iterator[Step]:
        """Yield what happens before the answer begins."""
        for name, value in self.effects:
            if EFFECTS[name].kind == "before":
                yield EFFECTS[name].apply(value)

    def reply(self) -> Reply | None:
        """Return the answer that takes the place of the right one, if any."""
        headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
        for name, value in self.effects:
            if EFFECTS[name].kind == "instead":
                reply: Reply = EFFECTS[name].apply(value)
                return msgspec.structs.replace(reply, headers=reply.headers | headers)
        return None

    def spoil(self, steps: Steps) -> Steps:
        """Return the steps of a stream as this fault leaves them."""
        for name, value in self.effects:
            if EFFECTS[name].kind == "on_steps":
                steps = EFFECTS[name].apply(steps, value)
        return steps


class FaultQueue:
    """The faults to come. Each request takes the first that matches it, and no more.

    It may be changed from any thread.
    """

    def __init__(self, faults: Iterable[Fault | str] = ()) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []
        self.extend(faults)

    def append(self, fault: Fault | str) -> None:
        """Add a fault, or the text of one, at the end.

        Raises:
            ValueError: The text is not a known fault.
        """
        parsed = Fault.parse(fault) if isinstance(fault, str) else fault
        with self._lock:
            self._waiting.append(parsed)

    def extend(self, faults: Iterable[Fault | str]) -> None:
        """Add several."""
        for fault in faults:
            self.append(fault)

    def clear(self) -> None:
        """Forget all faults that have not struck yet."""
        with self._lock:
            self._waiting.clear()

    @property
    def unused(self) -> list[Fault]:
        """The faults that have yet to strike, without those that always do."""
        return [fault for fault in self if fault.times is not None]

    def take(self, path: str, *, stream: bool) -> Fault | None:
        """Return the fault for a request, and count it as struck."""
        with self._lock:
            for index, fault in enumerate(self._waiting):
                if fault.matches(path, stream=stream):
                    if fault.times is not None:
                        left = [msgspec.structs.replace(fault, times=fault.times - 1)]
                        self._waiting[index : index + 1] = left if fault.times > 1 else []
                    return fault
        return None

    def __iter__(self) -> Iterator[Fault]:
        return iter(tuple(self._waiting))

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"FaultQueue({self._waiting})"


def describe_faults() -> str:
    """Return a line on each effect and option, for a help text."""
    lines = [(effect.name + _usage(effect), effect.help) for effect in EFFECTS.values()]
    lines += [(name, f"option, {text}") for name, text in OPTIONS.items()]
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in lines)


def _usage(effect: Effect) -> str:
    """Return how the value is written: ``=N``, ``[=CODE]`` where it may be left out, or nothing."""
    if effect.value.startswith("["):
        return f"[={effect.value.strip('[]')}]"
    return f"={effect.value}" if effect.value else ""


def _read(name: str, usage: str, parse: Callable[[str], Any], value: str) -> Any:
    try:
        return parse(value)
    except ValueError:
        raise ValueError(f"fault {name} is written {name}{usage}, not {name}={value}") from None


def _list_effects() -> str:
    return ", ".join(EFFECTS)
