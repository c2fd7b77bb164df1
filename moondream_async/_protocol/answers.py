"""Plain answers: a JSON body into a result, an error status into an error.

Servers differ in how they say that something failed: an object or a string
under ``error``, ``detail`` or ``message``, HTML from a gateway, and Station with
status 200. All of them end here as one `APIStatusError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from moondream_async._retry import parse_retry_after
from moondream_async.errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
)
from moondream_async.types import CaptionResult, Grounding, QueryResult, Reasoning, Result

from .requests import Skill

ANSWER_KEY: dict[Skill, str] = {"caption": "caption", "query": "answer"}
"""Where the text of a skill's answer stands."""

_EXCERPT = 500  # characters of a body that is no JSON, for the error message


def decode_body(skill: Skill, body: bytes, *, status: int = 200) -> Result:
    """Turn the JSON body of a plain answer into its result.

    Raises:
        APIStatusError: The body says that it is an error, or is no answer at all.
    """
    raw = _decode_object(body, status)
    if (error := _error_in(raw, status)) is not None:
        raise error
    key = ANSWER_KEY[skill]
    answer = raw.get(key)
    if not isinstance(answer, str):
        raise ServerError(
            f"The server's reply has no {key} in it: {_excerpt(body)}", status=status, body=raw
        )
    common = _common(raw)
    if skill == "query":
        return QueryResult(
            answer=answer, reasoning=decode_reasoning(raw.get("reasoning")), raw=raw, **common
        )
    return CaptionResult(caption=answer, raw=raw, **common)


def _decode_object(body: bytes, status: int) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ServerError(
            f"The server's reply is not JSON: {_excerpt(body)}", status=status, body=_excerpt(body)
        ) from error
    if not isinstance(raw, dict):
        raise ServerError(
            f"The server's reply is no JSON object: {_excerpt(body)}", status=status, body=raw
        )
    return raw


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "request_id": to_id(raw.get("request_id")),
        "finish_reason": to_id(raw.get("finish_reason")),
        "metrics": find_metrics(raw),
    }


def to_id(value: Any) -> str | None:
    """Read an id or a name; some servers number their requests."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def find_metrics(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the tokens and times, under whichever name they come."""
    for key in ("metrics", "_stats", "stats"):  # the latter two are Station's
        value = raw.get(key)
        if isinstance(value, dict):
            return value
    return None


def decode_reasoning(value: Any) -> Reasoning | None:
    """Read the reasoning out of a body or an event; spans that make no sense are left out."""
    if isinstance(value, str):
        return Reasoning(value)
    if not isinstance(value, dict):
        return None
    spans = []
    grounding = value.get("grounding")
    for span in grounding if isinstance(grounding, list) else ():
        try:
            spans.append(msgspec.convert(span, Grounding))
        except msgspec.ValidationError:
            continue
    text = value.get("text")
    return Reasoning(text if isinstance(text, str) else "", tuple(spans))


_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    413: PayloadTooLargeError,
    422: BadRequestError,
    429: RateLimitError,
}


def error_from_response(
    status: int, headers: Mapping[str, str], body: bytes, *, now: float
) -> APIStatusError:
    """Turn an answer with an error status into the error to raise; any body will do.

    `now` is the time in seconds since the epoch, for a ``Retry-After`` date.
    """
    try:
        raw: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raw = _excerpt(body)
    message, fields = describe(raw)
    cls = _BY_STATUS.get(status) or (ServerError if status >= 500 else APIStatusError)
    return cls(
        message or f"HTTP status {status} and an empty body",
        status=status,
        retry_after=parse_retry_after(headers.get("Retry-After"), now),
        body=raw,
        **fields,
    )


def _error_in(raw: Mapping[str, Any], status: int) -> APIStatusError | None:
    """Find the error in a body that came with status 200, as Station sends them."""
    if not raw.get("error"):
        return None
    message, fields = describe(raw)
    missing = isinstance(raw["error"], str) and message.endswith("not available")
    cls = NotFoundError if missing else ServerError
    return cls(message, status=status, body=raw, **fields)


def describe(raw: Any) -> tuple[str, dict[str, Any]]:
    """Find the message in whichever of the known shapes it comes."""
    fields: dict[str, Any] = {}
    if not isinstance(raw, dict):
        return (raw if isinstance(raw, str) else str(raw)[:_EXCERPT]), fields
    fields["request_id"] = to_id(raw.get("request_id"))
    error = raw.get("error") or raw.get("detail") or raw.get("message") or ""
    if isinstance(error, dict):
        fields.update({key: to_id(error.get(key)) for key in ("type", "code", "param")})
        error = error.get("message") or fields["type"] or fields["code"] or error
    elif isinstance(error, list):
        error = "; ".join(map(_describe_item, error))
    elif isinstance(raw.get("detail"), str) and error != raw["detail"]:  # kestrel's 500
        error = f"{error}: {raw['detail']}"
    message = error if isinstance(error, str) else str(error)
    return message[: 4 * _EXCERPT], fields


def _describe_item(item: Any) -> str:
    """Describe one of FastAPI's: ``{"loc": ["body", "question"], "msg": "field required"}``."""
    if not isinstance(item, dict):
        return str(item)
    place = item.get("loc")
    where = ".".join(map(str, place)) if isinstance(place, list) else place
    return f"{where}: {item.get('msg')}"


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * _EXCERPT].decode("utf-8", "replace").split())
    return text[:_EXCERPT]
