"""The options that commands share, each declared once, and the error for wrong ones.

A command takes a whole group of options as one parameter, as FastAPI's `Depends` does: see
`expand`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, Literal, NamedTuple, cast

import typer

from moondream_async import CallEvent, Hooks, MoondreamClient, types
from moondream_async import Timeout as Limits

from ._output import note
from ._session import run

UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)
"""The root of typer's errors of usage, made of a message and a context.

typer exports only one of its subclasses; the class itself is click's in some versions of
typer, and typer's own in others.
"""


def check_positive(value: float | None) -> float | None:
    """Refuse a number that is not over 0, and infinity."""
    if value is not None and not 0 < value < float("inf"):
        raise typer.BadParameter(f"{value:g} is not over 0, or not finite.")
    return value


def _seconds(value: str) -> float:
    """Read a time as people write it.

    >>> _seconds("1s"), _seconds("0.5"), _seconds("200ms"), _seconds("2m")
    (1.0, 0.5, 0.2, 120.0)
    """
    number, unit = re.fullmatch(r"\s*(.*?)\s*(ms|s|m|)\s*", value, re.DOTALL).groups()  # type: ignore[union-attr]
    try:
        seconds = float(number) * {"ms": 1e-3, "m": 60.0}.get(unit, 1.0)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise typer.BadParameter(f"{value!r} is no time over 0, as 1s or 0.5s.")
    return seconds


Image = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="The picture's path or web address, or - to read it from stdin.",
        show_default=False,
    ),
]

Endpoint = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The server's address, with its /v1. [default: MOONDREAM_ENDPOINT, "
        "else Moondream Cloud]",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        callback=check_positive,
        help="Give up when the answer is not complete by then. [default: after 120 seconds "
        "without a beginning, or 60 without going on]",
    ),
]

Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Print the answer as it is written, or when it is complete. "
        "[default: --stream; with --json, --no-stream]",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]

Reasoning = Annotated[
    bool | None,
    typer.Option(
        "--reasoning/--no-reasoning",
        help="Let the model think first; what it thought is printed on stderr. "
        "[default: the server's]",
    ),
]

Every = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        parser=_seconds,
        help="Time between two frames of a video, as 1s or 0.5s. [default: all frames]",
    ),
]


# -- groups ---------------------------------------------------------------------------------


class Group(NamedTuple):
    """Options that several commands share: the parameters of a function.

    A command's parameter that is annotated with a group gets what the function returns.
    """

    gather: Callable[..., Any]


def expand(command: Callable[..., object]) -> Callable[..., None]:
    """Return a command for typer, with a group's options in place of each parameter of a group.

    An asynchronous command is run, and its `client` is open meanwhile.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, tuple[Group, list[inspect.Parameter]]] = {}
    options: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        for group in getattr(each.annotation, "__metadata__", ()):
            if isinstance(group, Group):
                gathered = inspect.signature(group.gather, eval_str=True).parameters.values()
                own = [option.replace(kind=option.KEYWORD_ONLY) for option in gathered]
                groups[each.name] = group, own
                options += own
        if each.name not in groups:
            options.append(each)

    @wraps(command)
    def expanded(**given: Any) -> None:
        for name, (group, own) in groups.items():
            given[name] = group.gather(**{option.name: given.pop(option.name) for option in own})
        if inspect.iscoroutinefunction(command):
            run(_with_client(command, **given))
        else:
            command(**given)

    expanded.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    expanded.__annotations__ = {option.name: option.annotation for option in options}
    return expanded


async def _with_client(
    command: Callable[..., Awaitable[object]], *, client: Server, **given: Any
) -> None:
    async with client.client() as opened:
        await command(client=opened, **given)


def _settings(
    *,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cut the answer after so many tokens."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, help="How freely words are chosen; 0 is not at all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            metavar="P",
            max=1,
            callback=check_positive,
            help="Choose only among the likeliest words, which make up this share.",
        ),
    ] = None,
) -> types.Settings | None:
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in settings.items() if value is not None}
    return cast("types.Settings", given) if given else None


def _asked(
    *,
    skill: Annotated[
        Literal["caption", "query", "detect", "point", "segment"],
        typer.Option(help="What to ask."),
    ] = "caption",
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question, for query.")
    ] = None,
    object: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What to look for, for detect, point and segment."),
    ] = None,
    length: Annotated[
        types.Length | None, typer.Option(help="How much to say, for caption.")
    ] = None,
    reasoning: Annotated[
        bool | None,
        typer.Option("--reasoning/--no-reasoning", help="Let the model think first, for query."),
    ] = None,
) -> tuple[str, dict[str, Any]]:
    given = {"question": question, "object": object, "length": length, "reasoning": reasoning}
    return skill, {name: value for name, value in given.items() if value is not None}


def check_asked(
    context: typer.Context, skill: str, arguments: Mapping[str, Any], *, needed: bool = True
) -> None:
    """Refuse another skill's arguments and, where it is `needed`, a lack of the skill's own."""
    own = {"caption": "length", "query": "question"}.get(skill, "object")
    for name in arguments:
        if name != own and not (name == "reasoning" and skill == "query"):
            raise UsageError(f"'--{name}' is not for '--skill {skill}'", context)
    if needed and own != "length" and not arguments.get(own, "").strip():
        raise UsageError(f"'--skill {skill}' needs '--{own}'", context)


@dataclass(frozen=True)
class Server:
    """The server that the user's options name, and the limit on its answers."""

    endpoint: Endpoint = None
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model. [default: the server's]")
    ] = None
    timeout: Timeout = None

    def client(self, **others: Any) -> MoondreamClient:
        """Return a client; its key comes from the environment.

        A `timeout` in seconds is for the whole answer, and replaces the limits on its parts:
        a user who allows ten minutes waits that long for the beginning, too.
        """
        limits = Limits()
        if self.timeout is not None:
            limits = Limits(first_event=None, idle=None, total=self.timeout)
        watched = sys.stderr is not None and sys.stderr.isatty()
        options = {"hooks": Hooks(retry=_report_retry if watched else None), **others}
        return MoondreamClient(endpoint=self.endpoint, model=self.model, timeout=limits, **options)


def _report_retry(event: CallEvent) -> None:
    note(f"Trying again in {event.delay or 0:.1f} s: {event.error}")


def _server_alone(*, endpoint: Endpoint = None, timeout: Timeout = None) -> Server:
    return Server(endpoint, timeout=timeout)


Settings = Annotated[types.Settings | None, Group(_settings)]
"""How the model writes; None where the user leaves it to the server."""
Asked = Annotated[tuple[str, dict[str, Any]], Group(_asked)]
"""A skill, and the arguments that were given for it."""
OfModel = Annotated[Server, Group(Server)]
Client = Annotated[MoondreamClient, Group(_server_alone)]
"""For asynchronous commands that need no model."""
