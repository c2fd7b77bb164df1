"""JSON objects become values, field by field; an optional field that does not fit is left out.

So a server may add, drop and change optional fields, and no client fails; `raw` has the fields
as they came. Required fields must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

import msgspec

from moondream_async.errors import ServerError

from .answers import describe, show
from .convert import ValueT, convert

_EXCERPT = 500  # characters of a record, for the error message

_hints = cache(get_type_hints)


def read_value(kind: type[ValueT], record: Any, /, **known: Any) -> ValueT:
    """Turn a decoded object into a value; `known` gives fields that are not in the object.

    Raises:
        ServerError: A required field is missing.
    """
    values = dict(known)
    fields = record if isinstance(record, Mapping) else {}
    missing = []
    for name, required in kind.fields().items():
        if name in known:
            continue
        try:
            values[name] = convert(fields[name], _hints(kind)[name])
        except (KeyError, msgspec.ValidationError):
            if required:
                missing.append(name)
    if missing:
        raise ServerError(
            f"The server's reply holds no {' and no '.join(missing)}: {show(record):.{_EXCERPT}}",
            status=200,
            body=record,
        )
    return kind(**values)


def read_failure(error: Any) -> tuple[str | None, str]:
    """Return the code and the message of an ``error`` in any known form."""
    message, fields = describe({"error": error})
    return fields.get("code") or fields.get("type"), message
