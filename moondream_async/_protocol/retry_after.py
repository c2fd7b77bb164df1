"""The header ``Retry-After``."""

from __future__ import annotations

import re
from datetime import UTC

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for; None if it is no valid one.

    `now` is the time in seconds since the epoch, for headers with a date (RFC 9110, 10.2.3). A
    date in the past gives 0.

    >>> parse_retry_after("2.5", 0), parse_retry_after("-1", 0), parse_retry_after("soon", 0)
    (2.5, None, None)
    >>> parse_retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 50)
    10.0
    """
    if value is None:
        return None
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - slow to load, seldom needed

    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # dates in HTTP are UTC, also without a zone
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now)
    except (TypeError, ValueError, OverflowError, OSError):  # odd dates raise any of these
        return None
