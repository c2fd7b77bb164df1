"""Checks requests, and words the errors.

The rules are those of the engine behind the cloud: strict booleans, texts that
are not blank, settings in range, strict base64.
"""

from __future__ import annotations

import base64
import re
from functools import partial
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from moondream_async.types import Length

MAX_IMAGE_BYTES = 10 * 1024 * 1024  # the documented limit

Temperature = Annotated[float, Meta(ge=0)]
TopP = Annotated[float, Meta(gt=0, le=1)]
_Positive = Annotated[int, Meta(ge=1)]
_NotBlank = Annotated[str, Meta(pattern=r"\S")]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Reference = Annotated[list[_Share], Meta(min_length=2, max_length=4)]


class RefusedError(Exception):
    """The request is refused; each dialect has its own body for the error."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param


class SettingsBody(msgspec.Struct, frozen=True):
    """The settings that the server knows; others are ignored."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: _Positive | None = None
    max_objects: _Positive | None = None


class SkillBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that all skills take."""

    image_url: str | None = None
    model: str | None = None
    stream: bool = False
    settings: SettingsBody | None = None
    spatial_refs: list[_Reference] | None = None

    @property
    def max_tokens(self) -> int:
        """The most tokens of the answer; 768 is the engine's own limit."""
        return (self.settings and self.settings.max_tokens) or 768


class CaptionBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/caption``."""

    length: Length = "normal"


class QueryBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/query``."""

    question: _NotBlank
    reasoning: bool | None = None


class ObjectBody(SkillBody, frozen=True, kw_only=True):
    """The body of ``/detect``, ``/point`` and ``/segment``."""

    object: _NotBlank


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


def read_typed(body: Any, kind: type[TypedT], *, strict: bool = True) -> TypedT:
    """Check the types and ranges of a decoded body and return it typed.

    Not strict is the way to read a query string, whose numbers are texts.

    Raises:
        RefusedError: A field is missing, or of the wrong type or range.
    """
    if not isinstance(body, dict):
        raise RefusedError("Request body must be a JSON object")
    try:
        return msgspec.convert(body, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error


def read_body(body: Any, kind: type[BodyT], *, needs_image: bool = True) -> BodyT:
    """Check the body of a skill and return it typed.

    Raises:
        RefusedError: A field is missing, or of the wrong type or range.
    """
    typed = read_typed(body, kind)
    if needs_image and not typed.image_url:
        raise RefusedError("Field 'image_url' is required", param="image_url")
    if typed.spatial_refs is not None and not typed.image_url:
        raise RefusedError("Field 'spatial_refs' requires an image", param="spatial_refs")
    for reference in typed.spatial_refs or ():
        starts, ends = reference[:2], reference[-2:]
        if len(reference) == 3 or starts[0] > ends[0] or starts[1] > ends[1]:
            message = "Each of 'spatial_refs' must be [x, y] or [x_min, y_min, x_max, y_max]"
            raise RefusedError(message, param="spatial_refs")
    return typed


def decode_image(image_url: str) -> bytes:
    """Return the bytes of a data URL, or of bare base64.

    Raises:
        RefusedError: The URL is remote or malformed, or the picture is over the limit.
    """
    refused = partial(RefusedError, param="image_url")
    if re.match(r"https?://", image_url):
        raise refused("Field 'image_url' must be a data URL; remote URLs are not fetched")
    head, comma, encoded = image_url.rpartition(",")
    if comma and not re.fullmatch(r"data:image/[\w.+-]+;base64", head):
        raise refused("Field 'image_url' must begin with data:image/...;base64,")
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError as error:  # not base64, or not even ASCII
        raise refused("Invalid base64 image data") from error
    if len(data) > MAX_IMAGE_BYTES:
        raise refused("Image is larger than 10 MB", status=413)
    return data


def _explain(message: str) -> RefusedError:
    """Put msgspec's finding into the words of the API.

    >>> _explain("Expected `bool`, got `str` - at `$.stream`").message
    "Field 'stream' must be a boolean"
    """
    finding, _, path = message.rstrip("`").partition(" - at `$.")
    missing = re.search(r"missing required field `(\w+)", finding)
    kind = re.match(r"Expected `(\w+)(?: \| null)?`, got", finding)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        problem = "is required"
    elif finding.startswith("Expected `str` matching"):
        problem = "must be a non-empty string"
    elif kind and kind[1] in _KINDS:
        problem = f"must be {_KINDS[kind[1]]}"
    else:
        problem = f"is invalid: {finding}"
    return RefusedError(f"Field '{path}' {problem}", param=path)
