"""The format of the Batch API, without I/O: requests become lines, and lines results.

A file is JSONL: one JSON object a line, UTF-8, no blank lines. The client checks each
line, since the server would report an error only after the whole upload. Limits and
fields come from docs.moondream.ai/batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from moondream_async._protocol.answers import decode_object, read_result
from moondream_async._protocol.requests import (
    Request,
    Skill,
    caption_request,
    detect_request,
    point_request,
    query_request,
)
from moondream_async._protocol.values import read_failure, read_value
from moondream_async.errors import RequestError, ServerError
from moondream_async.results import Result
from moondream_async.types import EncodedImage, Length, Settings

from .records import Batch, BatchFailure, BatchProgress, BatchResult, BatchUsage

# The documentation says GB and MB: powers of ten keep the limit in either meaning.
MAX_FILE_BYTES = 2_000_000_000
MAX_LINE_BYTES = 10_000_000
MAX_LINES = 100_000

MAX_IMAGE_BYTES = 7_400_000
"""For all pictures of a line: base64 of them leaves 130 kB of the line for other fields."""

MAX_RESULT_BYTES = 16 * 1024 * 1024
"""For a line of results: far above any, since results hold no pictures."""

_SKILL_OF_KEY: dict[str, Skill] = {
    "caption": "caption",
    "answer": "query",
    "objects": "detect",
    "points": "point",
}


class BatchRequest(msgspec.Struct, frozen=True, eq=False):
    """One line of a batch: the arguments of a call.

    Made by `caption`, `query`, `detect` and `point`, which check their arguments as
    the client's methods do. The result has the same `id`; without an id, the result's
    `line_index` names the request.

    >>> BatchRequest.detect("street.jpg", "red car", id="street")
    BatchRequest(skill='detect', id='street', fields={'object': 'red car'})
    """

    skill: str
    id: str | int | None
    fields: dict[str, Any]
    """All fields of the line except the pictures, under the API's names."""
    images: tuple[Any, ...]
    """The pictures, as they were passed."""
    several: bool = False
    """Whether the pictures were given as `images`."""

    @classmethod
    def caption(
        cls,
        image: Any,
        *,
        length: Length = "normal",
        settings: Settings | None = None,
        id: str | int | None = None,  # noqa: A002 - the API's word
    ) -> BatchRequest:
        """Describe a picture.

        Raises:
            RequestError: An argument is invalid.

        >>> BatchRequest.caption("photo.jpg", length="short", id=7)
        BatchRequest(skill='caption', id=7, fields={'length': 'short'})
        """
        request = caption_request(image, length=length, stream=False, settings=settings, model=None)
        return cls._of(request, [image], id)

    @classmethod
    def query(
        cls,
        image: Any = None,
        question: str | None = None,
        *,
        images: Sequence[Any] | None = None,
        reasoning: bool | None = None,
        settings: Settings | None = None,
        id: str | int | None = None,  # noqa: A002 - the API's word
    ) -> BatchRequest:
        """Answer a question about a picture, or about several.

        Args:
            image: One picture. A batch needs `image` or `images`.
            question: The question.
            images: Several pictures, in place of `image`.
            reasoning: Whether the model thinks first. In a batch None means that it does.
            settings: Sampling settings; see `Settings`.
            id: The id of the result.

        Raises:
            RequestError: An argument is invalid.

        >>> BatchRequest.query("photo.jpg", "How many people?", id="a")
        BatchRequest(skill='query', id='a', fields={'question': 'How many people?'})
        """
        if images is not None and (
            isinstance(images, (str, bytes)) or not hasattr(images, "__iter__")
        ):
            raise RequestError(f"images must be a list of pictures, not {type(images).__name__}")
        if (image is None) == (not images):
            raise RequestError("a query in a batch needs one of image and images")
        pictures = [image] if not images else list(images)
        request = query_request(
            pictures[0],
            question,
            stream=False,
            reasoning=reasoning,
            spatial_refs=None,
            settings=settings,
            model=None,
        )
        return cls._of(request, pictures, id, several=bool(images))

    @classmethod
    def detect(
        cls,
        image: Any,
        object: str,
        *,
        id: str | int | None = None,  # noqa: A002 - the API's word
    ) -> BatchRequest:
        """Find objects in a picture and put a box around each. There are no settings.

        Raises:
            RequestError: An argument is invalid.

        >>> BatchRequest.detect("photo.jpg", "person")
        BatchRequest(skill='detect', id=None, fields={'object': 'person'})
        """
        return cls._of(detect_request(image, object, settings=None, model=None), [image], id)

    @classmethod
    def point(
        cls,
        image: Any,
        object: str,
        *,
        id: str | int | None = None,  # noqa: A002 - the API's word
    ) -> BatchRequest:
        """Find objects in a picture and put a point in each. There are no settings.

        Raises:
            RequestError: An argument is invalid.

        >>> BatchRequest.point("photo.jpg", "person")
        BatchRequest(skill='point', id=None, fields={'object': 'person'})
        """
        request = point_request(image, object, spatial_refs=None, settings=None, model=None)
        return cls._of(request, [image], id)

    @classmethod
    def _of(
        cls,
        request: Request,
        images: Sequence[Any],
        id: str | int | None,  # noqa: A002 - the API's word
        *,
        several: bool = False,
    ) -> BatchRequest:
        if isinstance(id, bool) or not isinstance(id, (str, int, type(None))):
            raise RequestError(f"id must be a string or a whole number, not {id!r}")
        left_out = ("image_url", "stream")
        fields = {key: value for key, value in request.payload.items() if key not in left_out}
        assert request.skill is not None  # noqa: S101 - for the type checker
        return cls(request.skill, id, fields, tuple(images), several)

    def __repr__(self) -> str:
        return f"BatchRequest(skill={self.skill!r}, id={self.id!r}, fields={self.fields!r})"

    def line(self, images: Sequence[EncodedImage]) -> bytes:
        """Return the line and its line break, with the pictures as base64.

        Raises:
            RequestError: A text can't be encoded.
        """
        named = {} if self.id is None else {"id": self.id}
        data = [image.data for image in images]
        pictures = {"images": data} if self.several else {"image": data[0]}
        fields = {**named, "skill": self.skill, **self.fields, **pictures}
        try:
            return msgspec.json.Encoder().encode_lines([fields])
        except UnicodeEncodeError as error:  # half a surrogate pair
            raise RequestError(f"The request can't be sent as JSON: {error}") from error


class Tally:
    """Counts the lines of a file, and checks the limits and the ids."""

    def __init__(self) -> None:
        self.lines = 0
        self.size = 0
        self._ids: dict[bytes, int] = {}

    @property
    def where(self) -> str:
        """The name of the next line in messages."""
        return f"line {self.lines + 1} of the batch"

    def add(self, size: int, id: Any) -> None:  # noqa: A002 - the API's word
        """Count a line of `size` bytes, line break included.

        Raises:
            RequestError: The line breaks a limit of the server, or repeats an id.
        """
        if self.lines == MAX_LINES:
            raise RequestError(f"{self.where} is one too many: the limit is {MAX_LINES:,} lines")
        if size - 1 > MAX_LINE_BYTES:
            raise RequestError(
                f"{self.where} is {size - 1:,} bytes long: the limit is {MAX_LINE_BYTES:,}"
            )
        if self.size + size > MAX_FILE_BYTES:
            raise RequestError(
                f"{self.where} makes the file too large: the limit is {MAX_FILE_BYTES:,} bytes"
            )
        if id is not None:
            key = msgspec.json.encode(id)  # any JSON value may be an id
            if key in self._ids:
                raise RequestError(f"{self.where} has the id of line {self._ids[key]}: {id!r:.100}")
            self._ids[key] = self.lines + 1
        self.lines += 1
        self.size += size

    def check_any(self) -> None:
        """Check that there was a line.

        Raises:
            RequestError: The file has no lines.
        """
        if not self.lines:
            raise RequestError("a batch needs at least one request")


class _Line(msgspec.Struct):
    """The fields of a line in a user's file that are checked."""

    skill: str
    id: Any = None
    image: msgspec.Raw = msgspec.Raw()  # not decoded, since it is most of the line
    images: msgspec.Raw = msgspec.Raw()


_decode_line = msgspec.json.Decoder(_Line).decode


def check_lines(file: BinaryIO, tally: Tally, size: int) -> bool:
    """Check the next lines of a user's file, `size` bytes or a little more. Blocks.

    Unknown skills and fields are not checked: the server fails only their lines.

    Returns:
        Whether there may be more lines.

    Raises:
        RequestError: The server would refuse the file for one of them, or the file is empty.
    """
    end = tally.size + size
    while tally.size < end:
        line = file.readline(MAX_LINE_BYTES + 2)
        if not line:
            tally.check_any()
            return False
        _check_line(line.removesuffix(b"\n"), tally)
    return True


def _check_line(data: bytes, tally: Tally) -> None:
    where = tally.where
    if len(data) > MAX_LINE_BYTES:
        raise RequestError(f"{where} is too long: the limit is {MAX_LINE_BYTES:,} bytes")
    if not data.strip():
        raise RequestError(f"{where} is blank")
    try:
        if not data.isascii():
            data.decode()  # msgspec does not check the UTF-8 of `Raw` fields
        line = _decode_line(data)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"{where} is no request: {error}") from error
    if line.skill == "query" and _is_none(line.image) and _is_none(line.images):
        raise RequestError(f"{where} is a query without a picture, which batches don't take")
    tally.add(len(data) + 1, line.id)


def _is_none(value: msgspec.Raw) -> bool:
    seen = memoryview(value)
    return seen.nbytes <= 4 and bytes(seen) in (b"", b"null", b'""', b"[]")


def read_batch(raw: Any) -> Batch:
    """Read the state of a batch.

    Raises:
        ServerError: The server's record has no id.
    """
    fields = raw if isinstance(raw, Mapping) else {}
    error = fields.get("error")
    return read_value(
        Batch,
        raw,
        raw=raw,
        progress=read_value(BatchProgress, fields.get("progress")),
        usage=_read_usage(fields.get("usage")),
        error=_read_failure(error) if error else None,
    )


def read_batch_result(line: bytes) -> BatchResult:
    """Read a line of results.

    Raises:
        ServerError: The line is not a JSON object.
    """
    raw = decode_object(line)
    error = raw.get("error")
    if not error and raw.get("status") == "error":
        error = "the server does not say why"
    return read_value(
        BatchResult,
        raw,
        raw=raw,
        result=None if error else _read_answer(raw.get("result")),
        error=_read_failure(error) if error else None,
        usage=_read_usage(raw.get("usage")),
    )


def _read_answer(raw: Any) -> Result:
    """Read an answer; its fields show the skill, which the server does not name."""
    if not isinstance(raw, dict):
        return Result(raw={"result": raw})
    for key, skill in _SKILL_OF_KEY.items():
        if key in raw:
            try:
                return read_result(skill, raw)
            except ServerError:
                break
    return Result(raw=raw)


def _read_failure(error: Any) -> BatchFailure:
    code, message = read_failure(error)
    return BatchFailure(code=code, message=message)


def _read_usage(raw: Any) -> BatchUsage | None:
    return read_value(BatchUsage, raw) if isinstance(raw, Mapping) else None
