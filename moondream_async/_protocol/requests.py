"""A call into a request: arguments checked, JSON made once, nothing sent yet.

Pictures stay out of the JSON: a `Request` keeps the parts between them, and the
transport writes each picture as a data URL in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from moondream_async.errors import RequestError
from moondream_async.types import EncodedImage

Skill = Literal["caption", "query"]


class Picture:
    """A place in a payload where the transport writes a picture."""

    __slots__ = ("source",)

    def __init__(self, source: Any) -> None:
        self.source = source


class Request:
    """One call, checked and encoded.

    The JSON is encoded once and used for every try. `json` are its parts with a
    picture between each two, so that no base64 copy of a picture is ever made whole.

    Raises:
        RequestError: The payload holds something that JSON can't say.
    """

    __slots__ = ("json", "path", "payload", "pictures", "skill")

    def __init__(self, skill: Skill, path: str, payload: dict[str, Any]) -> None:
        self.skill: Skill = skill
        self.path = path
        self.payload = {key: value for key, value in payload.items() if value is not None}
        self.pictures: list[Any] = []
        try:
            encoded = msgspec.json.encode(self.payload, enc_hook=self._put)
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
            raise RequestError(f"The request can't be sent as JSON: {error}") from error
        self.json: tuple[bytes, ...] = tuple(encoded.split(_PICTURE))

    def _put(self, value: Any) -> Any:
        if isinstance(value, Picture):
            self.pictures.append(value.source)
            return msgspec.Raw(_PICTURE)
        raise TypeError(f"{type(value).__name__} has no JSON form")

    @property
    def stream(self) -> bool:
        """Whether a stream is asked for."""
        return self.payload.get("stream") is True

    def without_stream(self) -> Request:
        """Return the same call, asking for the whole answer at once."""
        return Request(self.skill, self.path, {**self.payload, "stream": False})

    def body(self, images: Sequence[EncodedImage]) -> list[bytes | EncodedImage]:
        """Return what to send, piece by piece; each image goes out as a data URL in quotes."""
        body: list[bytes | EncodedImage] = [self.json[0]]
        for image, part in zip(images, self.json[1:], strict=True):
            body += (image, part)
        return body


_PICTURE = b"\0"  # can stand nowhere in JSON: control characters are always escaped there


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
    spatial_refs: Sequence[Sequence[float]] | None,
    settings: Mapping[str, Any] | None,
    model: str | None,
) -> Request:
    """Check the arguments of ``query`` and return its request."""
    if spatial_refs is not None and image is None:
        raise RequestError("spatial_refs point into a picture: query needs an image with them")
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


def _flag(name: str, value: Any) -> bool:
    # The servers take JSON booleans only; to Station, "false" is true.
    if not isinstance(value, bool):
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
        "temperature": ("a number of at least 0", lambda x: _number(x) and x >= 0),
        "top_p": ("a number over 0 and up to 1", lambda x: _number(x) and 0 < x <= 1),
        "max_tokens": ("a whole number of at least 1", _count),
        "max_objects": ("a whole number of at least 1", _count),
    }
    for name, value in settings.items():
        if name in limits:
            wanted, fits = limits[name]
            if not fits(value):
                raise RequestError(f"settings[{name!r}] must be {wanted}, not {value!r}")
    return dict(settings)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _list(name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise RequestError(f"{name} must be a sequence, not {value!r}") from None


def _spatial_refs(refs: Sequence[Sequence[float]]) -> list[list[float]]:
    checked = []
    for ref in _list("spatial_refs", refs):
        numbers = _list("a spatial ref", ref)
        if len(numbers) not in (2, 4) or not all(_number(x) and 0 <= x <= 1 for x in numbers):
            raise RequestError(
                f"a spatial ref is [x, y] or [x_min, y_min, x_max, y_max], each from 0 to 1, "
                f"not {ref!r}"
            )
        if len(numbers) == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
            raise RequestError(f"the box {ref!r} has its corners the wrong way round")
        checked.append(numbers)
    return checked
