"""What the server keeps of a batch. What it leaves out is None here, or empty."""

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
    """How many there are; 0 until the server has counted them."""
    completed: int = 0
    failed: int = 0


class BatchUsage(Value[Literal["input_tokens", "output_tokens"], int], kw_only=True):
    """How many tokens a batch, or a line of one, took."""

    __slots__ = ()

    input_tokens: int = 0
    output_tokens: int = 0


class BatchFailure(Value[Literal["code", "message"], str], kw_only=True):
    """Why a batch, or a line of one, came to nothing."""

    __slots__ = ()

    code: str | None = None
    """The server's name for it, as ``validation_error`` or ``image_decode_failed``."""
    message: str = ""
    """In the server's words."""


class BatchOutput(Value[Literal["index"], int, Literal["url"], str], kw_only=True):
    """A file of results."""

    __slots__ = ()

    index: int | None = None
    url: str
    """Whoever has this address can read the file, until the address expires."""

    _hidden = frozenset({"url"})  # whoever knows it can read the file


_Told = Literal["progress", "usage", "outputs", "error", "size"]
_Times = Literal["created_at", "completed_at", "expires_at"]


class Batch(Record[Literal["id", "status", "model"], str, _Told | _Times, Any], kw_only=True):
    """A batch, as it was when the server was asked."""

    __slots__ = ()

    id: str
    status: str = "unknown"
    """``chunking`` (the file is being checked), ``processing``, ``completed`` or ``failed``;
    or what a later server may say."""
    model: str | None = None
    progress: BatchProgress = msgspec.field(default_factory=BatchProgress)
    usage: BatchUsage | None = None
    """Known when it is completed."""
    outputs: list[BatchOutput] = msgspec.field(default_factory=list)
    """Where the results are; ``batches.results`` reads them."""
    created_at: dt.datetime | None = None
    completed_at: dt.datetime | None = None
    expires_at: dt.datetime | None = None
    """When the results will be deleted: 7 days after the end, says docs.moondream.ai/batch."""
    error: BatchFailure | None = None
    """Why it failed, if it did."""
    size: int | None = None
    """Bytes that were uploaded; told once, by ``batches.create``."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ended = self.status in ("completed", "failed")
        return ended or self.completed_at is not None or self.error is not None


class BatchResult(
    Record[Literal["result"], Result, Literal["id", "line_index", "error", "usage"], Any],
    kw_only=True,
):
    """What became of one line of a batch."""

    __slots__ = ()

    id: Any = None
    """The id that the request had."""
    line_index: int | None = None
    """The request's place in the batch, from 0."""
    result: Result | None = None
    """The answer, typed as that of the skill; None where the line failed."""
    error: BatchFailure | None = None
    """Why the line failed, if it did."""
    usage: BatchUsage | None = None

    @property
    def ok(self) -> bool:
        """Whether there is an answer."""
        return self.error is None
