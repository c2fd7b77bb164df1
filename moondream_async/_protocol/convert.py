"""Decoded JSON becomes typed values: msgspec's checks, extended to the types of `results`."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from moondream_async._values import Value, typed_dict

T = TypeVar("T")
ValueT = TypeVar("ValueT", bound=Value)


def convert(found: Any, kind: type[T]) -> T:
    """Convert decoded JSON to a type, which may hold our own types of values anywhere.

    Raises:
        msgspec.ValidationError: `found` does not fit the type.
    """
    return msgspec.convert(found, kind, dec_hook=_to_value)


def to_values(kind: type[ValueT], found: Any) -> list[ValueT]:
    """Convert a list of boxes or points, faster than `convert`: there may be many.

    Raises:
        msgspec.ValidationError: `found` is no list of these values.
    """
    shape: Any = list[typed_dict(kind)]  # type: ignore[misc]
    return [kind.of(each) for each in msgspec.convert(found, shape)]


def _to_value(kind: type, found: Any) -> Any:
    if not issubclass(kind, Value):
        raise NotImplementedError
    return kind(convert(found, typed_dict(kind)))
