"""The server's records of finetunes. Fields that it leaves out are None, or empty."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from moondream_async._checks import check_count
from moondream_async._values import Record
from moondream_async.results import BASE_MODEL, Point, Reasoning, Region


class Finetune(
    Record[
        Literal["finetune_id", "name"], str, Literal["rank", "created_at_ms", "updated_at_ms"], int
    ],
    kw_only=True,
):
    """A model that is being trained."""

    __slots__ = ()

    finetune_id: str
    name: str | None = None
    rank: int | None = None
    """Of the adapter: 8, 16, 24 or 32. A higher rank learns more, and more slowly."""
    created_at_ms: int | None = None
    """Milliseconds since the epoch, like all fields in ``_ms``."""
    updated_at_ms: int | None = None

    def model(self, step: int, *, base_model: str = BASE_MODEL) -> str:
        """Return the name of its state at a saved step, to pass as ``model=``.

        >>> Finetune(finetune_id="01HXYZ").model(500)
        'moondream3-preview/01HXYZ@500'
        """
        return _name_model(base_model, self.finetune_id, step)


class Checkpoint(
    Record[
        Literal["finetune_id", "checkpoint_id"],
        str,
        Literal["step", "created_at_ms", "updated_at_ms", "expires_at_ms"],
        int,
    ],
    kw_only=True,
):
    """A saved state of a finetune."""

    __slots__ = ()

    finetune_id: str
    step: int
    checkpoint_id: str | None = None
    created_at_ms: int | None = None
    updated_at_ms: int | None = None
    expires_at_ms: int | None = None

    def model(self, *, base_model: str = BASE_MODEL) -> str:
        """Return its name, to pass as ``model=``.

        >>> Checkpoint(finetune_id="01HXYZ", step=500).model()
        'moondream3-preview/01HXYZ@500'
        """
        return _name_model(base_model, self.finetune_id, self.step)


def _name_model(base_model: str, finetune_id: str, step: int) -> str:
    check_count("step", step, least=0)
    return f"{base_model}/{finetune_id}@{step}"


class CheckpointDownload(Record[Literal["url"], str, Literal["expires_in"], float], kw_only=True):
    """The address of a checkpoint, which expires."""

    __slots__ = ()

    url: str
    """Secret: this address alone is enough to fetch the checkpoint."""
    expires_in: float | None = None
    """Seconds."""

    _hidden = frozenset({"url"})


class RolloutOutput(
    Record[Literal["answer"], str, Literal["reasoning", "points", "objects"], Any], kw_only=True
):
    """The answer of a rollout, in the fields of its skill."""

    __slots__ = ()

    answer: str | None = None
    reasoning: Reasoning | None = None
    points: list[Point] | None = None
    objects: list[Region] | None = None


_Words = Literal["skill", "finish_reason", "has_answer_separator"]
_Lists = Literal["answer_tokens", "thinking_tokens", "coords", "sizes"]


class Rollout(Record[Literal["output"], RolloutOutput, _Words | _Lists, Any], kw_only=True):
    """One answer of a model in training, with its tokens."""

    __slots__ = ()

    output: RolloutOutput = msgspec.field(default_factory=RolloutOutput)
    skill: str | None = None
    finish_reason: str | None = None
    answer_tokens: list[int] = msgspec.field(default_factory=list)
    thinking_tokens: list[int] = msgspec.field(default_factory=list)
    has_answer_separator: bool | None = None
    coords: list[Any] = msgspec.field(default_factory=list)
    sizes: list[Any] = msgspec.field(default_factory=list)


class Rollouts(
    Record[Literal["rollouts"], list[Rollout], Literal["request", "rewards"], Any], kw_only=True
):
    """All answers to one request."""

    __slots__ = ()

    request: dict[str, Any] = msgspec.field(default_factory=dict)
    """The request as the server returns it, pictures included."""
    rollouts: list[Rollout] = msgspec.field(default_factory=list)
    rewards: list[float] | None = None
    """The reward of each rollout, if the request had a ground truth."""

    _hidden = frozenset({"request"})  # has the pictures


class TrainStep(
    Record[
        Literal["step"],
        int,
        Literal["applied", "kl", "router_kl", "grad_norm", "sft_loss", "reward_mean", "reward_std"],
        float,
    ],
    kw_only=True,
):
    """The result of a step of training."""

    __slots__ = ()

    step: int
    """The number of steps so far, this one included."""
    applied: bool | None = None
    """Whether the step changed the model."""
    kl: float | None = None
    router_kl: float | None = None
    grad_norm: float | None = None
    sft_loss: float | None = None
    reward_mean: float | None = None
    reward_std: float | None = None


class MetricsLog(Record[Literal["ok"], bool, Literal["step", "logged_count"], int], kw_only=True):
    """The server's answer to logged metrics."""

    __slots__ = ()

    ok: bool | None = None
    step: int | None = None
    logged_count: int | None = None
