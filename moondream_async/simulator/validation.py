"""What a request must be, and how a server says that it is not.

The rules are those of the engine behind the cloud: strict booleans, texts that
are not blank, settings in range, strict base64.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Any, TypeVar

import msgspec

from moondream_async.types import Length

MAX_IMAGE_BYTES = 10 * 1024 * 1024  # the documented limit

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Reference = Annotated[list[_Share], msgspec.Meta(min_length=2, max_length=4)]


class RefusedError(Exception):
    """The request can't be served; a dialect turns this into its own body."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param


class SettingsBody(msgspec.Struct, frozen=True):
    """The settings that the server knows; others are ignored."""

    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    max_tokens: _Positive | None = None
    max_objects: _Positive | None = None


class SkillBody(msgspec.Struct, frozen=True, kw_only=True):
    """What all skills take."""

    image_url: str | None = None
    model: str | None = None
    stream: bool = False
    settings: SettingsBody | None = None
    spatial_refs: list[_Reference] | None = None

    @property
    def max_tokens(self) -> int:
        """How many tokens the answer may have; 768 is the engine's own limit."""
        return (self.settings and self.settings.max_tokens) or 768


class CaptionBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/caption``."""

    length: Length = "normal"


class QueryBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/query``."""

    question: str
    reasoning: bool | None = None


class ObjectBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/detect``, ``/point`` and ``/segment``."""

    object: str


TypedT = TypeVar("TypedT", bound=msgspec.Struct)
BodyT = TypeVar("BodyT", bound=SkillBody)

# msgspec's words for a type, and the engine's.
_KINDS = {
    "bool": "a boolean",
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "array": "an array",
    "object": "an object",
}


def read_typed(body: Any, kind: type[TypedT]) -> TypedT:
    """Check the types and ranges of a decoded body and return it typed.

    Raises:
        RefusedError: It lacks a field, or one is not what it must be.
    """
    if not isinstance(body, dict):
        raise RefusedError("Request body must be a JSON object")
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def read_body(body: Any, kind: type[BodyT], *, needs_image: bool = True) -> BodyT:
    """Check the body of a skill and return it typed.

    Raises:
        RefusedError: It lacks a field, or one is not what it must be.
    """
    typed = read_typed(body, kind)
    for name in ("question", "object"):
        if name in kind.__struct_fields__ and not getattr(typed, name).strip():
            raise RefusedError(f"Field '{name}' must be a non-empty string", param=name)
    if needs_image and not typed.image_url:
        raise RefusedError("Field 'image_url' is required", param="image_url")
    _check_references(typed)
    return typed


def decode_image(image_url: str) -> bytes:
    """Return the bytes of a data URL, or of bare base64.

    Raises:
        RefusedError: It is a remote URL, not base64, or a picture over the limit.
    """
    if re.match(r"https?://", image_url):
        raise RefusedError(
            "Field 'image_url' must be a data URL; remote URLs are not fetched", param="image_url"
        )
    head, comma, encoded = image_url.partition(",")
    if not comma:
        encoded = head
    elif not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise RefusedError(
            "Field 'image_url' must begin with data:image/...;base64,", param="image_url"
        )
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: not ASCII
        raise RefusedError("Invalid base64 image data", param="image_url") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise RefusedError("Image is larger than 10 MB", status=413, param="image_url")
    return data


def _check_references(body: SkillBody) -> None:
    if body.spatial_refs is None:
        return
    if not body.image_url:
        raise RefusedError("Field 'spatial_refs' requires an image", param="spatial_refs")
    for reference in body.spatial_refs:
        ordered = len(reference) == 2 or (
            len(reference) == 4 and reference[0] <= reference[2] and reference[1] <= reference[3]
        )
        if not ordered:
            raise RefusedError(
                "Each of 'spatial_refs' must be [x, y] or [x_min, y_min, x_max, y_max]",
                param="spatial_refs",
            )


def _explain(message: str) -> RefusedError:
    """Put msgspec's finding into the words of the API.

    >>> _explain("Expected `bool`, got `str` - at `$.stream`").message
    "Field 'stream' must be a boolean"
    """
    finding, _, path = message.rstrip("`").partition(" - at `$.")
    missing = re.search(r"missing required field `(\w+)", finding)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return RefusedError(f"Field '{path}' is required", param=path)
    kind = re.match(r"Expected `(\w+)(?: \| null)?`, got", finding)
    if kind and kind[1] in _KINDS:
        return RefusedError(f"Field '{path}' must be {_KINDS[kind[1]]}", param=path)
    return RefusedError(f"Field '{path}' is invalid: {finding}", param=path)
