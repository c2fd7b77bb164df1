"""Frozen values of what a server keeps: batches, finetunes and what belongs to them.

Like the results in `types` they are read by attribute or by item, and each carries
`raw`. Servers add to them as they grow: what is missing, or not of the kind that is
expected, is None here, or empty.
"""

from __future__ import annotations

import datetime as dt
from typing import Any, ClassVar

import msgspec

from .errors import RequestError
from .types import Point, Reasoning, Region, Result, _Value

BASE_MODEL = "moondream3-preview"
"""What finetunes are made from where nothing else is said (the official SDK's word)."""


class _Record(_Value, frozen=True, kw_only=True):
    """What the server keeps, as it was when it was asked."""

    raw: dict[str, Any] = msgspec.field(default_factory=dict)
    """The decoded record, whole."""

    _hidden: ClassVar[tuple[str, ...]] = ("raw",)  # from repr

    def __repr__(self) -> str:
        fields = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name in self.__struct_fields__
            if name not in self._hidden and getattr(self, name) is not None
        )
        return f"{type(self).__name__}({fields})"


class BatchProgress(_Value, frozen=True, kw_only=True):
    """How many lines of a batch are done."""

    total: int = 0
    """How many there are; 0 until the server has counted them."""
    completed: int = 0
    failed: int = 0


class BatchUsage(_Value, frozen=True, kw_only=True):
    """How many tokens a batch, or a line of one, took."""

    input_tokens: int = 0
    output_tokens: int = 0


class BatchFailure(_Value, frozen=True, kw_only=True):
    """Why a batch, or a line of one, came to nothing."""

    code: str | None = None
    """The server's name for it, as ``validation_error`` or ``image_decode_failed``."""
    message: str = ""
    """In the server's words."""


class BatchOutput(_Value, frozen=True, kw_only=True):
    """A file of results."""

    index: int | None = None
    url: str
    """Whoever has this address can read the file, until the address expires."""

    def __repr__(self) -> str:
        return f"BatchOutput(index={self.index})"  # the address is a secret


class Batch(_Record, frozen=True, kw_only=True):
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


class BatchResult(_Record, frozen=True, kw_only=True):
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


class Finetune(_Record, frozen=True, kw_only=True):
    """A model that is being trained."""

    finetune_id: str
    name: str | None = None
    rank: int | None = None
    """Of the adapter: 8, 16, 24 or 32. A higher one learns more, and more slowly."""
    created_at_ms: int | None = None
    """Milliseconds since the epoch, as all of these."""
    updated_at_ms: int | None = None

    def model(self, step: int, *, base_model: str = BASE_MODEL) -> str:
        """Return what to pass as ``model=`` to use what it had learnt at a saved step.

        >>> Finetune(finetune_id="01HXYZ").model(500)
        'moondream3-preview/01HXYZ@500'
        """
        return _name_model(base_model, self.finetune_id, step)


class Checkpoint(_Record, frozen=True, kw_only=True):
    """A state of a finetune that was saved."""

    finetune_id: str
    step: int
    checkpoint_id: str | None = None
    created_at_ms: int | None = None
    updated_at_ms: int | None = None
    expires_at_ms: int | None = None

    def model(self, *, base_model: str = BASE_MODEL) -> str:
        """Return what to pass as ``model=`` to use it.

        >>> Checkpoint(finetune_id="01HXYZ", step=500).model()
        'moondream3-preview/01HXYZ@500'
        """
        return _name_model(base_model, self.finetune_id, self.step)


def _name_model(base_model: str, finetune_id: str, step: int) -> str:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise RequestError(f"step must be a whole number, not {step!r}")
    return f"{base_model}/{finetune_id}@{step}"


class CheckpointDownload(_Record, frozen=True, kw_only=True):
    """Where a checkpoint can be fetched from for a while."""

    url: str
    """Whoever has this address can fetch it. It takes no key."""
    expires_in: float | None = None
    """Seconds."""

    _hidden: ClassVar[tuple[str, ...]] = ("raw", "url")


class RolloutOutput(_Record, frozen=True, kw_only=True):
    """The answer of a rollout; which fields it has depends on the skill."""

    answer: str | None = None
    reasoning: Reasoning | None = None
    points: tuple[Point, ...] | None = None
    objects: tuple[Region, ...] | None = None


class Rollout(_Record, frozen=True, kw_only=True):
    """One try of a model that is being trained, and what training wants to know of it."""

    output: RolloutOutput = RolloutOutput()
    skill: str | None = None
    finish_reason: str | None = None
    answer_tokens: tuple[int, ...] = ()
    thinking_tokens: tuple[int, ...] = ()
    has_answer_separator: bool | None = None
    coords: tuple[Any, ...] = ()
    sizes: tuple[Any, ...] = ()


class Rollouts(_Record, frozen=True, kw_only=True):
    """All tries at one request."""

    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """The request, as the server says it back; pictures included."""
    rollouts: tuple[Rollout, ...] = ()
    rewards: tuple[float, ...] | None = None
    """How good each is, where the request came with its ground truth."""

    _hidden: ClassVar[tuple[str, ...]] = ("raw", "request")


class TrainStep(_Record, frozen=True, kw_only=True):
    """What a step of training did."""

    step: int
    """How many there were, this one included."""
    applied: bool | None = None
    """Whether it changed the model."""
    kl: float | None = None
    router_kl: float | None = None
    grad_norm: float | None = None
    sft_loss: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None


class MetricsLog(_Record, frozen=True, kw_only=True):
    """What became of metrics that were logged."""

    ok: bool | None = None
    step: int | None = None
    logged_count: int | None = None
