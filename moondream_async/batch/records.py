"""The server's records of batches. Fields that it leaves out are None, or empty."""

from __future__ import annotations

import datetime as dt
from typing import Any, Literal

import msgspec

from moondream_async._values import Record, Value
from moondream_async.results import Result


class BatchProgress(Value[Literal["total", "completed", "failed"], int], kw_only=True):
    """How many lines of a batch are done."""

    __slots__ = ()

    total: int = 0
    """All lines; 0 until the server has counted them."""
    completed: int = 0
    failed: int = 0


class BatchUsage(Value[Literal["input_tokens", "output_tokens"], int], kw_only=True):
    """The tokens of a batch, or of one line."""

    __slots__ = ()

    input_tokens: int = 0
    output_tokens: int = 0


class BatchFailure(Value[Literal["code", "message"], str], kw_only=True):
    """Why a batch, or one line of it, failed."""

    __slots__ = ()

    code: str | None = None
    """The server's name for the reason, as ``validation_error`` or ``image_decode_failed``."""
    message: str = ""
    """In the server's words."""


class BatchOutput(Value[Literal["index"], int, Literal["url"], str], kw_only=True):
    """A file of results."""

    __slots__ = ()

    index: int | None = None
    url: str
    """Secret: this address alone is enough to read the file, until it expires."""

    _hidden = frozenset({"url"})


_Told = Literal["progress", "usage", "outputs", "error", "size"]
_Times = Literal["created_at", "completed_at", "expires_at"]


class Batch(Record[Literal["id", "status", "model"], str, _Told | _Times, Any], kw_only=True):
    """The state of a batch at the time of the call."""

    __slots__ = ()

    id: str
    status: str = "unknown"
    """``chunking`` (the server checks the file), ``processing``, ``completed`` or ``failed``;
    or a word of a later server."""
    model: str | None = None
    progress: BatchProgress = msgspec.field(default_factory=BatchProgress)
    usage: BatchUsage | None = None
    """Known when the batch is completed."""
    outputs: list[BatchOutput] = msgspec.field(default_factory=list)
    """The files of results; ``batches.results`` reads them."""
    created_at: dt.datetime | None = None
    completed_at: dt.datetime | None = None
    expires_at: dt.datetime | None = None
    """When the server deletes the results: 7 days after the end (docs.moondream.ai/batch)."""
    error: BatchFailure | None = None
    """Why the batch failed, if it did."""
    size: int | None = None
    """Bytes that were uploaded; set by ``batches.create`` alone."""

    @property
    def done(self) -> bool:
        """Whether the batch has ended: it is completed, or it failed."""
        ended = self.status in ("completed", "failed")
        return ended or self.completed_at is not None or self.error is not None


class BatchResult(
    Record[Literal["result"], Result, Literal["id", "line_index", "error", "usage"], Any],
    kw_only=True,
):
    """The result of one line of a batch: an answer or an error."""

    __slots__ = ()

    id: Any = None
    """The id of the request."""
    line_index: int | None = None
    """The request's place in the batch, from 0."""
    result: Result | None = None
    """The answer, of the skill's type; None if the line failed."""
    error: BatchFailure | None = None
    """Why the line failed, if it did."""
    usage: BatchUsage | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None
