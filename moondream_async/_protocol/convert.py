"""Decoded JSON into typed values: msgspec's checks, for types that msgspec does not know."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from moondream_async._values import Value, typed_dict

T = TypeVar("T")
ValueT = TypeVar("ValueT", bound=Value)


def convert(found: Any, kind: type[T]) -> T:
    """Check what was decoded against a type, in which our own values may stand anywhere.

    Raises:
        msgspec.ValidationError: It is no such thing.
    """
    return msgspec.convert(found, kind, dec_hook=_to_value)


def to_values(kind: type[ValueT], found: Any) -> list[ValueT]:
    """Check a list of boxes or points: the quick way, since there may be many.

    Raises:
        msgspec.ValidationError: It is no list of such.
    """
    shape: Any = list[typed_dict(kind)]  # type: ignore[misc]
    return [kind.of(each) for each in msgspec.convert(found, shape)]


def _to_value(kind: type, found: Any) -> Any:
    if not issubclass(kind, Value):
        raise NotImplementedError
    return kind(convert(found, typed_dict(kind)))
