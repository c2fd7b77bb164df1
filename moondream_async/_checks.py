"""The checks of numbers that callers pass; one of each kind, for the whole package."""

from __future__ import annotations

from typing import Any

from .errors import RequestError


def is_count(value: Any, *, least: int = 1, most: int | None = None) -> bool:
    """Tell whether a value is a whole number within limits; True and False are none.

    >>> is_count(3), is_count(True), is_count(2.0), is_count(9, most=8)
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return value >= least and (most is None or value <= most)


def is_number(value: Any, *, least: float = -1e300, most: float = 1e300) -> bool:
    """Tell whether a value is a number within limits; NaN, infinity, True and False are none.

    >>> is_number(0.5), is_number(True), is_number(float("nan")), is_number(float("inf"))
    (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return least <= value <= most


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None) -> None:
    """Raise `RequestError` unless a value is a whole number within limits.

    >>> check_count("max_retries", 3, least=0)
    """
    if not is_count(value, least=least, most=most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise RequestError(f"{name} must be a whole number {limits}, not {value!r}")


def check_positive(name: str, value: Any, what: str = "a number over 0") -> None:
    """Raise `RequestError` unless a value is a finite number over 0.

    >>> check_positive("rate_limit", 2.5)
    """
    if not is_number(value) or value <= 0:
        raise RequestError(f"{name} must be {what}, not {value!r}")


def check_ssl_context(value: Any) -> None:
    """Raise `RequestError` unless a value is an `ssl.SSLContext`, or None."""
    # Known by what is done with it: this room loads no `ssl`.
    if value is not None and not hasattr(value, "wrap_bio"):
        raise RequestError(f"ssl_context must be an ssl.SSLContext, not {value!r:.100}")
