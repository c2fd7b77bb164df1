"""Ways in which a server can fail, on demand.

A fault is a short text, as ``cut=3`` or ``status=429,retry_after=1,times=2``: one or more
of `EFFECTS`, and of `OPTIONS`, which say which requests it strikes. `describe_faults`
prints both tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .steps import Event, HangUp, Queue, Reply, Step, Steps, Wait

_Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
_Number = Annotated[int, Meta(ge=1, le=1_000_000_000)]
_Seconds = Annotated[float, Meta(ge=0)]
_Header = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]*\Z")]  # a header's value


class Effect(msgspec.Struct, frozen=True):
    """One way to fail, and how its value is written."""

    value: str
    """The word after the equals sign in the help, in brackets if optional; "" for no value."""
    help: str
    apply: Callable[..., Any]
    type: Any = _Count
    default: Any = None

    @property
    def usage(self) -> str:
        """How the value is written: ``=N``, ``[=CODE]`` if it may be left out, or nothing."""
        if self.value.startswith("["):
            return f"[={self.value.strip('[]')}]"
        return f"={self.value}" if self.value else ""


class Instead(Effect, frozen=True):
    """Another reply takes the place of the right one: `apply` makes it of the value."""


class Before(Effect, frozen=True):
    """A step comes before the answer: `apply` makes it of the value."""


class OnSteps(Effect, frozen=True):
    """The steps of a stream are made worse: `apply` takes the steps and the value.

    A fault with such an effect strikes only requests that ask for a stream.
    """


def _html(code: int) -> Reply:
    page = f"<html><head><title>{code}</title></head><body>Error {code}</body></html>"
    return Reply(code, page, content_type="text/html")


def _redirect(target: str) -> Reply:
    code, colon, url = target.partition(":")
    status, url = (int(code), url) if colon and code.isdigit() else (307, target)
    return Reply(status, "", headers={"Location": url})


def _after(*instead: Step) -> Callable[[Steps, int], Steps]:
    """Send so many events, then these steps in place of the rest."""
    return lambda steps, count: itertools.chain(itertools.islice(steps, count), instead)


def _inside(*instead: Step) -> Callable[[Steps, int], Steps]:
    """Send half of the event with this number, then these steps in place of the rest."""

    def spoil(steps: Steps, number: int) -> Steps:
        yield from itertools.islice(steps, number - 1)
        for step in itertools.islice(steps, 1):
            if isinstance(step, Event):
                yield Event(step.data[: len(step.data) // 2], step.tokens)
        yield from instead

    return spoil


def _bad_json(steps: Steps, count: int) -> Steps:
    broken = Event(b'data: {"chunk": \n\n')
    return itertools.chain(itertools.islice(steps, count), [broken], steps)


def _big_event(steps: Steps, size: int) -> Steps:
    big = (Event(b'data: {"chunk": "' + b"x" * size), Event(b'", "completed": false}\n\n'))
    return itertools.chain(big, steps)


def _heartbeats(steps: Steps, seconds: float) -> Steps:
    ping = Event(b": ping\n\n")
    for step in steps:
        yield ping
        while isinstance(step, Wait) and step.seconds is None:
            yield Wait(seconds)
            yield ping
        yield step


def _endless(steps: Steps, _: None) -> Steps:
    return itertools.cycle([step for step in steps if isinstance(step, Event) and not step.last])


def _split(steps: Steps, size: int) -> Steps:
    for step in steps:
        if isinstance(step, Event):
            for start in range(0, len(step.data), size):
                yield Event(step.data[start : start + size], step.tokens if start == 0 else 0)
        else:
            yield step


_ERROR = Event(b'data: {"error": {"message": "Inference failed", "type": "server_error"}}\n\n')
_NAMED_ERROR = Event(b'event: error\ndata: {"message": "Inference failed"}\n\n')
_REJECTED = Reply(200, {"error": "Queue is full", "status": "rejected"})

EFFECTS: dict[str, Effect] = {
    "status": Instead("CODE", "answers with this HTTP status", Reply),
    "html": Instead("[CODE]", "answers with a gateway's HTML page", _html, _Count, 502),
    "reject": Instead("", "answers that the queue is full, with status 200", lambda _: _REJECTED),
    "redirect": Instead(
        "URL", "redirects there with status 307, or to CODE:URL with another", _redirect, _Header
    ),
    "slow_start": Before("SECONDS", "waits before it answers at all", Wait, _Seconds),
    "hang_up": Before(
        "[reset]",
        "closes the connection instead of answering",
        lambda how: HangUp(reset=how == "reset"),
        Literal["reset"],
        "",
    ),
    # The server looks for this one by its name, and then there are no steps.
    "json": OnSteps("", "answers with a JSON body although a stream was asked", lambda *_: ()),
    "cut": OnSteps("N", "ends the body in good order after N events, without the last", _after()),
    "drop": OnSteps("N", "closes the connection after N events", _after(HangUp())),
    "reset": OnSteps("N", "resets the connection after N events", _after(HangUp(reset=True))),
    "cut_inside": OnSteps("N", "closes it in the middle of event N", _inside(HangUp()), _Number),
    "stall": OnSteps("N", "sends nothing more after N events", _after(Wait(None))),
    "stall_inside": OnSteps(
        "N", "sends nothing more from the middle of event N", _inside(Wait(None)), _Number
    ),
    "error_event": OnSteps("N", "sends an event with an error after N events", _after(_ERROR)),
    "named_error": OnSteps("N", "likewise, as an SSE event named error", _after(_NAMED_ERROR)),
    "bad_json": OnSteps("N", "sends an event that is not JSON after N events", _bad_json),
    "big_event": OnSteps("BYTES", "begins with a line of so many bytes", _big_event),
    "heartbeats": OnSteps(
        "[SECONDS]",
        "sends a comment before every event, and one each so many seconds while it stalls",
        _heartbeats,
        _Seconds,
        0.05,
    ),
    "endless": OnSteps("", "says the same again and again and never completes", _endless),
    "split": OnSteps("BYTES", "sends every event in pieces of so many bytes", _split, _Number),
}
OPTIONS = {
    "times": "N or always: how many requests it strikes; 1 unless told",
    "path": "TEXT: strikes only requests whose path contains this",
    "retry_after": "VALUE: sends the header Retry-After with a status",
}


class Fault(msgspec.Struct, frozen=True):
    """A way to fail, the requests that it strikes, and their number.

    Effects act in the order of the text: ``stall=3,heartbeats`` is a stream that stalls
    after three events and then sends comments.
    """

    effects: tuple[tuple[str, Any], ...]
    """Names and values."""
    times: int | None = 1
    """The number of requests that it strikes; None is all."""
    path: str = ""
    """Strikes only requests whose path contains this."""
    retry_after: str | None = None
    """The value of ``Retry-After``, sent with a status."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read a fault from its text on a command line.

        Raises:
            ValueError: The text has no fault, an unknown one, or an invalid value. The
                message lists the known faults, or shows how the value is written.

        >>> Fault.parse("status=429,retry_after=1,times=2")
        Fault(effects=(('status', 429),), times=2, path='', retry_after='1')
        """
        known = f"known are {', '.join(EFFECTS)}"
        effects: list[tuple[str, Any]] = []
        options: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            effect = EFFECTS.get(name)
            if name == "times":
                options[name] = None if value == "always" else _read(name, "=N", _Number, value)
            elif name == "retry_after":
                options[name] = _read(name, "=VALUE", _Header, value)
            elif name in OPTIONS:
                options[name] = value
            elif effect is None:
                raise ValueError(f"unknown fault {name!r}; {known}")
            elif equals and effect.value:
                effects.append((name, _read(name, effect.usage, effect.type, value)))
            elif equals or effect.usage.startswith("="):
                raise ValueError(f"fault {part!r} is written {name}{effect.usage}")
            else:
                effects.append((name, effect.default))
        if not effects:
            raise ValueError(f"no fault in {text!r}; {known}")
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
        """Whether it strikes a request to `path`; `stream`: a request for a stream."""
        return self.path in path and (stream or not any(self._of_kind(OnSteps)))

    def has(self, name: str) -> bool:
        """Whether the named effect is one of its effects."""
        return any(effect == name for effect, _ in self.effects)

    def before(self) -> Iterator[Step]:
        """Yield the steps before the answer begins."""
        for effect, value in self._of_kind(Before):
            yield effect.apply(value)

    def reply(self) -> Reply | None:
        """Return the reply that takes the place of the right one, if any."""
        headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
        for effect, value in self._of_kind(Instead):
            reply: Reply = effect.apply(value)
            return msgspec.structs.replace(reply, headers=reply.headers | headers)
        return None

    def spoil(self, steps: Steps) -> Steps:
        """Return the steps of a stream, made worse by this fault."""
        for effect, value in self._of_kind(OnSteps):
            steps = effect.apply(steps, value)
        return steps

    def _of_kind(self, kind: type[Effect]) -> Iterator[tuple[Effect, Any]]:
        for name, value in self.effects:
            if isinstance(EFFECTS[name], kind):
                yield EFFECTS[name], value


class FaultQueue(Queue[Fault]):
    """The faults to come. Each request takes the first that matches it, and no other.

    A queue may be changed from any thread.
    """

    def __init__(self, faults: Iterable[Fault | str] = ()) -> None:
        super().__init__()
        self.extend(faults)

    def append(self, fault: Fault | str) -> None:
        """Add a fault, or the text of one, at the end.

        Raises:
            ValueError: The text is not a known fault.
        """
        self._add(Fault.parse(fault) if isinstance(fault, str) else fault)

    def extend(self, faults: Iterable[Fault | str]) -> None:
        """Add several faults."""
        for fault in faults:
            self.append(fault)

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


def describe_faults() -> str:
    """Return a line on each effect and option, for a help text."""
    lines = [(name + effect.usage, effect.help) for name, effect in EFFECTS.items()]
    lines += [(name, f"option, {text}") for name, text in OPTIONS.items()]
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:<{width}}  {text}" for usage, text in lines)


def _read(name: str, usage: str, kind: Any, value: str) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError:
        raise ValueError(f"fault {name} is written {name}{usage}, not {name}={value}") from None
