"""What the server keeps of a batch. What it leaves out is None here, or empty."""

from __future__ import annotations

import datetime as dt
from typing import Any

from moondream_async.results import Record, Result, Value


class BatchProgress(Value, frozen=True, kw_only=True):
    """How many lines of a batch are done."""

    total: int = 0
    """How many there are; 0 until the server has counted them."""
    completed: int = 0
    failed: int = 0


class BatchUsage(Value, frozen=True, kw_only=True):
    """How many tokens a batch, or a line of one, took."""

    input_tokens: int = 0
    output_tokens: int = 0


class BatchFailure(Value, frozen=True, kw_only=True):
    """Why a batch, or a line of one, came to nothing."""

    code: str | None = None
    """The server's name for it, as ``validation_error`` or ``image_decode_failed``."""
    message: str = ""
    """In the server's words."""


class BatchOutput(Value, frozen=True, kw_only=True):
    """A file of results."""

    index: int | None = None
    url: str
    """Whoever has this address can read the file, until the address expires."""

    def __repr__(self) -> str:
        return f"BatchOutput(index={self.index})"  # the address is a secret


class Batch(Record, frozen=True, kw_only=True):
    """A batch, as it was when the server was asked."""

    id: str
    status: str = "unknown"
    """``chunking`` (the file is being checked), ``processing``, ``completed`` or ``failed``;
    or what a later server may say."""
    model: str | None = None
    progress: BatchProgress = BatchProgress()
    usage: BatchUsage | None = None
    """Known when it is completed."""
    outputs: tuple[BatchOutput, ...] = ()
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


class BatchResult(Record, frozen=True, kw_only=True):
    """What became of one line of a batch."""

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
