"""A call's arguments are checked here and become a `Request`; nothing is sent yet.

Pictures stay out of the JSON: `Request.parts` gives the JSON in pieces with the pictures between
them, and the transport sends each picture as a data URL in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from moondream_async._checks import is_count, is_number
from moondream_async.errors import RequestError
from moondream_async.results import ChatMessage, Point, Region, SpatialRefs

Skill = Literal["caption", "query", "detect", "point", "segment", "chat"]

CHAT_MODEL = "moondream3-preview"  # the official SDK's default
_ROLES = ("system", "user", "assistant")


class Picture:
    """A picture in a payload, as the caller gave it: it is prepared when the request is sent."""

    __slots__ = ("source",)

    def __init__(self, source: Any) -> None:
        self.source = source


class Request:
    """One call with checked arguments; its JSON is made when it is sent."""

    __slots__ = (
        "at_root",
        "bearer",
        "elsewhere",
        "method",
        "path",
        "payload",
        "repeatable",
        "skill",
        "upload",
    )

    def __init__(
        self,
        skill: Skill | None,
        path: str,
        payload: Mapping[str, Any] | None = None,
        *,
        method: str = "POST",
        bearer: bool = False,
        at_root: bool = False,
        elsewhere: bool = False,
        repeatable: bool = True,
        upload: Any = None,
    ) -> None:
        self.skill = skill
        """None for a request that is no skill's, as for the list of models."""
        self.path = path
        self.method = method
        self.bearer = bearer
        """Whether the key goes out as ``Authorization: Bearer``, as OpenAI's clients send it."""
        self.at_root = at_root
        """Whether `path` starts at the server's root, and not below the endpoint's ``/v1``."""
        self.elsewhere = elsewhere
        """Whether `path` is a whole address, of another server, which does not get the key."""
        self.repeatable = repeatable
        """Whether sending it twice does no harm. If False, it is sent again only when the
        server can't have begun to process it."""
        self.upload = upload
        """A file to send in place of JSON, in a form that the transport takes."""
        self.payload = {key: value for key, value in (payload or {}).items() if value is not None}
        """The JSON object to send; a request with an empty payload has no body."""

    @property
    def stream(self) -> bool:
        """Whether a stream is asked for."""
        return self.payload.get("stream") is True

    def without_stream(self) -> Request:
        """Return the same call without streaming."""
        payload = {**self.payload, "stream": False, "stream_options": None}
        return Request(
            self.skill,
            self.path,
            payload,
            method=self.method,
            bearer=self.bearer,
            at_root=self.at_root,
        )

    def parts(self) -> list[Any]:
        """Return the body: pieces of JSON in bytes with a `Picture` between them; or `upload`.

        In pieces, so that the base64 of a picture never stands in memory as a whole.

        Raises:
            RequestError: The payload holds a value that has no JSON form.
        """
        if self.upload is not None:
            return [self.upload]
        if not self.payload:
            return []
        pictures: list[Picture] = []

        def put(value: Any) -> Any:
            if isinstance(value, Picture):
                pictures.append(value)
                return msgspec.Raw(_PICTURE)
            for kind in (str, int, float):
                if isinstance(value, kind):  # a subclass, as a number of numpy's
                    return kind(value)
            raise TypeError(f"{type(value).__name__} has no JSON form")

        try:
            encoded = msgspec.json.encode(self.payload, enc_hook=put)
        except (
            TypeError,
            ValueError,
            OverflowError,
            RecursionError,
            msgspec.MsgspecError,
        ) as error:
            raise RequestError(f"The request can't be sent as JSON: {error}") from error
        if not pictures:
            return [encoded]
        first, *others = encoded.split(_PICTURE)
        parts: list[Any] = [first]
        for picture, piece in zip(pictures, others, strict=True):
            parts += (picture, piece)
        return parts


_PICTURE = b"\0"  # stands nowhere else in JSON, where control characters are escaped


def caption_request(
    image: Any,
    *,
    length: str,
    stream: bool,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``caption`` and return its request."""
    if image is None:
        raise RequestError("caption needs an image")
    if length not in ("short", "normal", "long"):
        raise RequestError(f"length must be 'short', 'normal' or 'long', not {length!r}")
    payload = {
        "image_url": Picture(image),
        "length": length,
        "stream": _flag("stream", stream),
        "settings": _settings(settings),
        "model": _model(model),
    }
    return Request("caption", "/caption", payload)


def query_request(
    image: Any,
    question: str | None,
    *,
    stream: bool,
    reasoning: bool | None,
    spatial_refs: SpatialRefs | None,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``query`` and return its request."""
    if spatial_refs is not None and image is None:
        raise RequestError("spatial_refs point into a picture: query needs an image with them")
    if question is None and isinstance(image, str):
        raise RequestError(
            "query needs a question: query(image, question), or, about no picture, "
            "query(question=...)"
        )
    payload = {
        "image_url": None if image is None else Picture(image),
        "question": _text("question", question),
        "stream": _flag("stream", stream),
        "reasoning": None if reasoning is None else _flag("reasoning", reasoning),
        "spatial_refs": None if spatial_refs is None else _spatial_refs(spatial_refs),
        "settings": _settings(settings),
        "model": _model(model),
    }
    return Request("query", "/query", payload)


def detect_request(
    image: Any, object: str, *, settings: Mapping[str, Any] | None, model: str | None
) -> Request:
    """Check the arguments of ``detect`` and return its request."""
    return Request("detect", "/detect", _object_payload("detect", image, object, settings, model))


def point_request(
    image: Any,
    object: str,
    *,
    spatial_refs: SpatialRefs | None,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``point`` and return its request."""
    payload = _object_payload("point", image, object, settings, model)
    payload["spatial_refs"] = None if spatial_refs is None else _spatial_refs(spatial_refs)
    return Request("point", "/point", payload)


def segment_request(
    image: Any,
    object: str,
    *,
    stream: bool,
    spatial_refs: SpatialRefs | None,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``segment`` and return its request."""
    payload = _object_payload("segment", image, object, settings, model)
    payload["stream"] = _flag("stream", stream)
    payload["spatial_refs"] = None if spatial_refs is None else _spatial_refs(spatial_refs)
    return Request("segment", "/segment", payload)


def _object_payload(
    skill: str, image: Any, object: str, settings: Mapping[str, Any] | None, model: str | None
) -> dict[str, Any]:
    if image is None:
        raise RequestError(f"{skill} needs an image")
    return {
        "image_url": Picture(image),
        "object": _text("object", object),
        "settings": _settings(settings),
        "model": _model(model),
    }


def chat_request(
    messages: Sequence[Mapping[str, Any] | ChatMessage],
    *,
    stream: bool,
    reasoning: bool | None,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``chat`` and return its request.

    Chat follows OpenAI's protocol, in which the settings stand beside the messages.
    """
    sampling = _settings(settings) or {}
    if "max_tokens" in sampling:
        sampling.setdefault("max_completion_tokens", sampling.pop("max_tokens"))
    payload = {
        "model": _model(model) or CHAT_MODEL,
        "messages": _messages(messages),
        "stream": _flag("stream", stream),
        "stream_options": {"include_usage": True} if stream else None,
        "reasoning": None if reasoning is None else _flag("reasoning", reasoning),
        **sampling,
    }
    return Request("chat", "/chat/completions", payload, bearer=True)


def _messages(messages: Sequence[Mapping[str, Any] | ChatMessage]) -> list[dict[str, Any]]:
    """Check a conversation by the rules of the open engine, which breaks with 500 on others."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of messages, not {messages!r:.100}")
    if not messages:
        raise RequestError("messages must not be empty")
    checked = []
    for number, message in enumerate(map(_turn, messages)):
        role = message["role"] if isinstance(message, Mapping) and "role" in message else None
        if role not in _ROLES or "content" not in message:
            raise RequestError(
                f"messages[{number}] must have a role ('system', 'user' or 'assistant') and content"
            )
        if role == "system" and number:
            raise RequestError(f"messages[{number}]: a system message can only be the first")
        content = _content(f"messages[{number}]", message["content"], pictures=role == "user")
        if role == "user" and _is_blank(content):
            raise RequestError(f"messages[{number}]: content must not be empty")
        checked.append({**message, "content": content})
    if checked[-1]["role"] != "user":
        raise RequestError("the last of the messages must be the user's")
    return checked


def _turn(message: Any) -> Any:
    """Return a result's message as one to send, without its reasoning; others as they are."""
    if isinstance(message, ChatMessage):
        return {"role": message.role, "content": message.content}
    return message


def _content(where: str, content: Any, *, pictures: bool) -> Any:
    if isinstance(content, str):
        return content
    if isinstance(content, (bytes, Mapping)) or not isinstance(content, Sequence):
        raise RequestError(f"{where}: content must be a string or a list of parts")
    return [_part(f"{where}, part {i}", part, pictures=pictures) for i, part in enumerate(content)]


def _is_blank(content: str | list[dict[str, Any]]) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return all("text" in part and not part["text"].strip() for part in content)


def _part(where: str, part: Any, *, pictures: bool) -> dict[str, Any]:
    """Turn one part of a message into OpenAI's form.

    A part is text or a picture. A picture is anything that `caption` takes, alone or in place
    of the URL in OpenAI's ``image_url``.
    """
    if isinstance(part, str):
        return {"type": "text", "text": part}
    source = part
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            return dict(part)
        source = part.get("image_url") if kind == "image_url" else part.get("image")
        if isinstance(source, Mapping):
            source = source.get("url")
        if kind not in ("image_url", "image"):
            source = None
    if source is None:
        raise RequestError(
            f"{where} must be text, a picture, {{'type': 'text', 'text': ...}} or "
            f"{{'type': 'image_url', 'image_url': {{'url': ...}}}}"
        )
    if not pictures:
        raise RequestError(f"{where}: only the user's messages can have pictures")
    return {"type": "image_url", "image_url": {"url": Picture(source)}}


def _flag(name: str, value: Any) -> bool:
    # The servers take JSON booleans only; Station reads the string "false" as true.
    if value is not True and value is not False:
        raise RequestError(f"{name} must be True or False, not {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be a string that is not empty, not {value!r}")
    return value


def _model(model: Any) -> str | None:
    return None if model is None else _text("model", model)


def _settings(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise RequestError(f"settings must be a mapping, not {settings!r}")
    limits: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "temperature": ("a number of at least 0", partial(is_number, least=0)),
        "top_p": ("a number over 0 and up to 1", lambda x: is_number(x, most=1) and x > 0),
        "max_tokens": ("a whole number of at least 1", is_count),
        "max_objects": ("a whole number of at least 1", is_count),
    }
    for name, value in settings.items():
        if name in limits:
            wanted, fits = limits[name]
            if not fits(value):
                raise RequestError(f"settings[{name!r}] must be {wanted}, not {value!r}")
    return dict(settings)


def _list(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise RequestError(f"{name} must be a sequence, not {value!r}") from None


_PLACE_KEYS = {frozenset(kind.fields()): tuple(kind.fields()) for kind in (Point, Region)}


def _spatial_refs(refs: SpatialRefs) -> list[list[float]]:
    checked = []
    for ref in _list("spatial_refs", refs):
        # The points and boxes of earlier results are taken, too.
        keys = _PLACE_KEYS.get(frozenset(ref)) if isinstance(ref, Mapping) else None
        numbers = [ref[key] for key in keys] if keys else _list("a spatial ref", ref)
        if len(numbers) not in (2, 4) or not all(is_number(x, least=0, most=1) for x in numbers):
            raise RequestError(
                f"a spatial ref is [x, y] or [x_min, y_min, x_max, y_max], each from 0 to 1, "
                f"not {ref!r}"
            )
        if len(numbers) == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
            raise RequestError(f"the box {ref!r} has its corners the wrong way round")
        checked.append(numbers)
    return checked
