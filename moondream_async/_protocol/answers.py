"""Plain answers: a JSON body becomes a result, an error status becomes an error.

Servers report a failure in different ways: as an object or a string under ``error``, ``detail``
or ``message``, as HTML from a gateway, or, like Station, with status 200. Each of these becomes
an `APIStatusError` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

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
from moondream_async.results import (
    CaptionResult,
    ChatMessage,
    ChatResult,
    DetectResult,
    Grounding,
    Model,
    Point,
    PointResult,
    QueryResult,
    Reasoning,
    Region,
    Result,
    SegmentResult,
    ServerStats,
    Usage,
)

from .convert import convert, to_values
from .decoding import decode
from .requests import Skill
from .retry_after import parse_retry_after

ANSWER_KEY: dict[Skill, str] = {"caption": "caption", "query": "answer", "segment": "path"}
"""The field of a skill's text, in a body and in the last event of a stream."""

_EXCERPT = 500  # characters of a body that is no JSON, for the error message


def decode_json(body: bytes, *, status: int = 200) -> dict[str, Any]:
    """Decode the JSON object of a plain answer.

    Raises:
        APIStatusError: The body is no JSON object, or reports an error.
    """
    raw = decode_object(body, status=status)
    if raw.get("error"):  # Station reports errors with status 200
        raise _error_in(raw, status)
    return raw


def read_result(
    skill: Skill,
    raw: dict[str, Any],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Result:
    """Turn the decoded body of a skill's plain answer into its result.

    Raises:
        APIStatusError: The body does not hold the answer.
    """
    kind, read = _READERS[skill]
    try:
        return kind.of(read(raw) | _common(raw), raw=raw, headers=headers)
    except (LookupError, AttributeError, TypeError, msgspec.ValidationError) as error:
        raise ServerError(
            f"The server's reply to {skill} does not hold the answer: {show(raw):.{_EXCERPT}}",
            status=status,
            headers=headers,
            body=raw,
        ) from error


def _read_caption(raw: dict[str, Any]) -> dict[str, Any]:
    return {"caption": _text(raw["caption"])}


def _read_query(raw: dict[str, Any]) -> dict[str, Any]:
    thought = raw.get("reasoning")
    reasoning = decode_reasoning(raw.get("reasoning_content") if thought is None else thought)
    return {"answer": _text(raw["answer"])} | _said(reasoning=reasoning)


def _read_detect(raw: dict[str, Any]) -> dict[str, Any]:
    return {"objects": to_values(Region, raw["objects"])}


def _read_point(raw: dict[str, Any]) -> dict[str, Any]:
    return {"points": to_values(Point, raw["points"])}


def _read_segment(raw: dict[str, Any]) -> dict[str, Any]:
    parse_error = to_id(raw.get("parse_error"))
    path = (raw.get("path") or "") if parse_error else raw["path"]
    bbox = decode_region(raw.get("bbox"))
    return {"path": _text(path)} | _said(bbox=bbox, parse_error=parse_error)


def _read_chat(raw: dict[str, Any]) -> dict[str, Any]:
    choice = raw["choices"][0]
    said = choice["message"]
    reasoning = find_reasoning(said)
    message = ChatMessage(
        role=to_id(said.get("role")) or "assistant",
        content=_text("" if said["content"] is None else said["content"]),  # None: reasoning only
        reasoning=None if reasoning is None else reasoning.text,
        reasoning_details=reasoning if reasoning and reasoning.grounding else None,
    )
    return {"message": message} | _said(
        finish_reason=to_id(choice.get("finish_reason")), usage=decode_usage(raw.get("usage"))
    )


_READERS: dict[Skill, tuple[type[Result], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "caption": (CaptionResult, _read_caption),
    "query": (QueryResult, _read_query),
    "detect": (DetectResult, _read_detect),
    "point": (PointResult, _read_point),
    "segment": (SegmentResult, _read_segment),
    "chat": (ChatResult, _read_chat),
}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("the answer is no text")
    return value


def read_models(raw: dict[str, Any]) -> list[Model]:
    """Read a list of models in OpenAI's form, as the cloud sends it, or in Station's."""
    entries = raw.get("data")
    if not isinstance(entries, list):
        entries = raw.get("models")
    models = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and (name := to_id(entry.get("id"))):
            known = {key: to_id(entry.get(key)) for key in ("name", "description", "version")}
            models.append(Model(id=name, raw=entry, **known))
    return models


def read_stats(raw: dict[str, Any]) -> ServerStats:
    """Read Station's numbers; where they are not as expected, `raw` alone has them."""
    try:
        return ServerStats.of(convert(raw, ServerStats), raw=raw)
    except msgspec.ValidationError:
        return ServerStats(raw=raw)


def decode_object(body: bytes, *, status: int = 200) -> dict[str, Any]:
    """Decode a JSON object; a field ``error`` in it raises nothing.

    Raises:
        ServerError: The body is no JSON object.
    """
    try:
        raw = decode(body)
    except ValueError as error:
        raise ServerError(
            f"The server's reply is not JSON: {_excerpt(body) or 'an empty body'}",
            status=status,
            body=_excerpt(body),
        ) from error
    if not isinstance(raw, dict):
        raise ServerError(
            f"The server's reply is no JSON object: {_excerpt(body)}", status=status, body=raw
        )
    return raw


def _common(raw: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if id_ := find_id(raw):
        said["request_id"] = id_
    if reason := to_id(raw.get("finish_reason")):
        said["finish_reason"] = reason
    if (metrics := find_metrics(raw)) is not None:
        said["metrics"] = metrics
    return said


def _said(**items: Any) -> dict[str, Any]:
    return {name: value for name, value in items.items() if value is not None}


def to_id(value: Any) -> str | None:
    """Read an id or a name; a number, which some servers use, becomes a string."""
    if isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def find_id(raw: Mapping[str, Any]) -> str | None:
    """Return the server's id of a request, under its own name or OpenAI's."""
    return to_id(raw.get("request_id")) or to_id(raw.get("id"))


def find_metrics(raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the counts of tokens and the times, under each name that servers use."""
    for key in ("metrics", "_stats", "stats"):  # the last two are Station's
        if key in raw and isinstance(value := raw[key], dict):
            return value
    return None


def decode_reasoning(value: Any) -> Reasoning | None:
    """Read the reasoning in a body or an event; spans in an unknown form are left out."""
    if isinstance(value, str):
        return Reasoning(value)
    if not isinstance(value, dict):
        return None
    spans = []
    grounding = value.get("grounding")
    for span in grounding if isinstance(grounding, list) else ():
        try:
            spans.append(convert(span, Grounding))
        except msgspec.ValidationError:
            continue
    text = value.get("text")
    return Reasoning(text if isinstance(text, str) else "", spans)


def find_reasoning(message: Mapping[str, Any]) -> Reasoning | None:
    """Find the reasoning in a chat message or a piece of one, under each name that servers use.

    Text and grounding may have two names: in the official client's types, ``reasoning`` is the
    text and ``reasoning_details`` has ``grounding`` alone.
    """
    details = message.get("reasoning_details")
    if isinstance(details, list):  # a list of pieces, as OpenRouter sends them
        texts = [each.get("text") for each in details if isinstance(each, dict)]
        text = "".join(each for each in texts if isinstance(each, str))
        details = {"text": text} if text else None
    values = (details, message.get("reasoning"), message.get("reasoning_content"))
    found = [each for each in map(decode_reasoning, filter(None, values)) if each is not None]
    if not found:
        return None
    return Reasoning(
        next((each.text for each in found if each.text), ""),
        next((each.grounding for each in found if each.grounding), []),
    )


def decode_region(value: Any) -> Region | None:
    """Read a box; None if `value` is not one."""
    try:
        return convert(value, Region)
    except msgspec.ValidationError:
        return None


def decode_usage(value: Any) -> Usage | None:
    """Read the token counts of a chat; None if `value` has none."""
    try:
        return convert(value, Usage)
    except msgspec.ValidationError:
        return None


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
    status: int, headers: Mapping[str, str], body: bytes, *, now: float, endpoint: str = ""
) -> APIStatusError:
    """Turn an answer with an error status, and any body, into the error to raise.

    `now` is the time in seconds since the epoch, for a ``Retry-After`` date. For a 404 at an
    `endpoint` without ``/v1``, the message suggests the address with it.
    """
    from multidict import CIMultiDict  # noqa: PLC0415 - loaded with aiohttp, not with the package

    try:
        raw: Any = decode(body)
    except ValueError:
        raw = _excerpt(body)
    message, fields = describe(raw)
    cls = _BY_STATUS.get(status) or (ServerError if status >= 500 else APIStatusError)
    message = message or f"HTTP status {status}: {_excerpt(body) or 'an empty body'}"
    if status == 404 and endpoint and not endpoint.endswith("/v1"):
        message = f"{message} (at {endpoint}; did you mean {endpoint}/v1?)"
    return cls(
        message,
        status=status,
        retry_after=parse_retry_after(headers.get("Retry-After"), now),
        headers=CIMultiDict(headers),
        body=raw,
        **fields,
    )


def _error_in(raw: Mapping[str, Any], status: int) -> APIStatusError:
    """Return the error that a body with status 200 reports."""
    message, fields = describe(raw)
    missing = isinstance(raw["error"], str) and message.endswith("not available")
    cls = NotFoundError if missing else ServerError
    return cls(message, status=status, body=raw, **fields)


def describe(raw: Any) -> tuple[str, dict[str, Any]]:
    """Return the message of an error in any known form, and the fields for its exception."""
    fields: dict[str, Any] = {}
    if not isinstance(raw, dict):
        return show(raw)[:_EXCERPT], fields
    fields["request_id"] = to_id(raw.get("request_id"))
    error = raw.get("error") or raw.get("detail") or raw.get("message") or ""
    if isinstance(error, dict):
        fields.update({key: to_id(error.get(key)) for key in ("type", "code", "param")})
        error = error.get("message") or fields["type"] or fields["code"] or error
    elif isinstance(error, list):
        error = "; ".join(map(_describe_item, error))
    elif isinstance(raw.get("detail"), str) and error != raw["detail"]:  # kestrel's 500
        error = f"{show(error)}: {raw['detail']}"
    return show(error)[: 4 * _EXCERPT], fields


def _describe_item(item: Any) -> str:
    """Describe an item of FastAPI's form: ``{"loc": ["body", "object"], "msg": "required"}``."""
    if not isinstance(item, dict) or "msg" not in item:
        return show(item)
    place = item.get("loc")
    where = ".".join(map(show, place)) if isinstance(place, list) else ""
    return f"{where}: {show(item['msg'])}" if where else show(item["msg"])


def show(value: Any) -> str:
    """Return a JSON value as text for a message; a string stays as it is."""
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _excerpt(body: bytes) -> str:
    text = " ".join(body[: 4 * _EXCERPT].decode("utf-8", "replace").split())
    return text[:_EXCERPT]
