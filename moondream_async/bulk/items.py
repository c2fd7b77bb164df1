"""The items and the results of a bulk run."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypedDict, TypeVar, cast

import msgspec

from moondream_async._protocol.requests import (
    Request,
    Skill,
    caption_request,
    detect_request,
    point_request,
    query_request,
    segment_request,
)
from moondream_async.errors import MoondreamError, RequestError
from moondream_async.results import SpatialRefs
from moondream_async.types import EncodedImage, Length, Settings

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")
Make = Callable[[Any], Request]

FIELDS: dict[str, tuple[Callable[..., Request], dict[str, Any]]] = {
    "caption": (caption_request, {"length": "normal", "stream": False}),
    "query": (
        query_request,
        {"question": None, "stream": False, "reasoning": None, "spatial_refs": None},
    ),
    "detect": (detect_request, {"object": None}),
    "point": (point_request, {"object": None, "spatial_refs": None}),
    "segment": (segment_request, {"object": None, "stream": False, "spatial_refs": None}),
}
"""The skills: what makes a request, and the arguments that it needs."""
_OWN = ("question", "object", "length")  # arguments that an item may have for itself
_ASKED = ("image", *_OWN)
NO_PICTURE = EncodedImage(b"", "image/jpeg", 0, 0)


class BulkItem(msgspec.Struct, frozen=True, kw_only=True):
    """A picture with its own question, object or length; None takes the value of the run.

    A mapping with the same keys can be an item, too, and may have further keys. A misspelt key,
    as ``questoin``, makes the item fail with a `RequestError`.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         item = md.BulkItem(image=md.SAMPLE_IMAGE, id=7, question="How many?")
    ...         async for each in client.bulk([item], "query"):
    ...             print(each.id, each.ok)
    >>> asyncio.run(main())
    7 True
    """

    image: Any
    """The picture, as `caption` takes it."""
    id: Any = None
    """Your own id of the item; the result has it, too."""
    question: str | None = None
    object: str | None = None
    length: str | None = None


class BulkResult(msgspec.Struct, Generic[ItemT, ResultT], frozen=True, kw_only=True):
    """The outcome of one item: a result or an error.

    >>> BulkResult(item="photo.jpg", index=0, error=MoondreamError("unreadable")).ok
    False
    """

    item: ItemT
    """The item, as it came from the iterable."""
    index: int
    """The number of the item, from 0."""
    result: ResultT = None  # type: ignore[assignment] # so that after `ok` no check for None is needed
    """The skill's result; None if `ok` is false."""
    error: MoondreamError | None = None
    """The error if there is no result."""
    tries: int = 0
    """How many requests were sent for the item; 0 if its picture could not be prepared."""
    seconds: float = 0.0
    """The time from the item's start to its end, with all attempts and waits."""

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.error is None

    @property
    def id(self) -> Any:
        """The item's id, if it has one."""
        if isinstance(self.item, Mapping):
            return self.item.get("id")
        return self.item.id if isinstance(self.item, BulkItem) else None


class Arguments(TypedDict, total=False):
    """The arguments of all skills, for type checkers; each skill takes some of them."""

    length: Length
    question: str | None
    object: str | None
    reasoning: bool | None
    spatial_refs: SpatialRefs | None
    settings: Settings | None
    model: str | None


class BulkOptions(Arguments, total=False):
    """The keyword arguments of `MoondreamClient.bulk`."""

    ordered: bool
    concurrency: int | None
    max_retries: int | None


class Asking:
    """What a run asks: a skill, and its arguments for all items.

    Raises:
        RequestError: There is no such skill, or an argument is wrong. A missing question or
            object is no error, since each item may have its own.
    """

    def __init__(
        self,
        skill: str,
        arguments: Mapping[str, Any],
        *,
        model: str | None,
        stream: bool = False,
    ) -> None:
        if not isinstance(skill, str) or skill not in FIELDS:
            raise RequestError(f"skill must be one of {', '.join(FIELDS)}, not {skill!r}")
        self.skill = cast("Skill", skill)
        self._make, defaults = FIELDS[skill]
        known = {*defaults, "settings", "model"} - {"stream"}
        if unknown := set(arguments) - known:
            raise RequestError(f"{skill} has no argument {_misspelt(unknown, known)}")
        given = {name: value for name, value in arguments.items() if value is not None}
        self._arguments = {**defaults, "settings": None, "model": model, **given}
        if stream:
            self._arguments["stream"] = True
        # A mistake that holds for every item is reported before the first item.
        needed = {"query": "question"}.get(skill, "object")
        may_come = {} if self._arguments.get(needed, "") is not None else {needed: "?"}
        self._make(NO_PICTURE, **{**self._arguments, **may_come}).parts()

    def about(self, item: Any) -> tuple[Any, Make]:
        """Return the picture of an item, and a function that makes the request for a picture.

        Raises:
            RequestError: The item is invalid.
        """
        if isinstance(item, Mapping):
            item = self._read(item)
        if not isinstance(item, BulkItem):
            return item, lambda image: self._make(image, **self._arguments)
        own = {name: getattr(item, name) for name in _OWN if getattr(item, name) is not None}
        if unknown := set(own) - set(self._arguments):
            raise RequestError(f"{self.skill} has no argument {', '.join(sorted(unknown))}")
        arguments = {**self._arguments, **own}
        return item.image, lambda image: self._make(image, **arguments)

    def _read(self, item: Mapping[str, Any]) -> BulkItem:
        known = BulkItem.__struct_fields__
        if wrong := {key for key in set(item) - set(known) if _near(key, _ASKED)}:
            raise RequestError(f"an item has no key {_misspelt(wrong, _ASKED)}")
        if "image" not in item:
            raise RequestError("an item that is a mapping needs the key 'image'")
        return BulkItem(**{key: value for key, value in item.items() if key in known})


def _near(name: Any, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(str(name), known, 1, 0.8)


def _misspelt(unknown: Iterable[Any], known: Iterable[str]) -> str:
    """List unknown names, each with the name that was probably meant."""
    names = []
    for name in sorted(map(str, unknown)):
        near = _near(name, known)
        names.append(f"{name!r:.100}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    return ", ".join(names)
