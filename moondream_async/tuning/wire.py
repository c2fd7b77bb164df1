"""The format of the tuning API, without I/O: requests and answers.

The format follows docs.moondream.ai (finetuning, HTTP API reference) and the official
SDK, moondream 2.6.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from moondream_async._checks import check_count, is_count
from moondream_async._protocol.answers import decode_reasoning
from moondream_async._protocol.requests import (
    Picture,
    Request,
    detect_request,
    point_request,
    query_request,
)
from moondream_async._protocol.values import read_value
from moondream_async.errors import RequestError
from moondream_async.types import Settings

from .records import Finetune, Rollout, RolloutOutput, Rollouts

RANKS = (8, 16, 24, 32)
MAX_ROLLOUTS = 16
LEARNING_RATE = 2e-4
"""The SDK's. It is always sent, since the server's own default has changed before."""

SpatialRefs = Sequence[Sequence[float]]


class TuningRequest(msgspec.Struct, frozen=True, eq=False):
    """A request to a model in training, and its right answer.

    Made by `query`, `detect` and `point`, which check their arguments as the client's
    methods do.

    >>> TuningRequest.point("street.jpg", "red car", ground_truth={"points": [{"x": 0, "y": 1}]})
    TuningRequest(skill='point', fields={'object': 'red car'})
    """

    skill: str
    fields: dict[str, Any]
    """All fields to send except the picture, under the API's names."""
    image: Any = None
    """The picture, as it was passed."""
    ground_truth: Mapping[str, Any] | None = None
    context: Any = None
    """Any value of the caller's, which is not sent."""
    num_rollouts: int | None = None
    """The number of answers to this request, if it differs from the others'."""

    @classmethod
    def query(
        cls,
        image: Any = None,
        question: str | None = None,
        *,
        reasoning: bool | None = None,
        spatial_refs: SpatialRefs | None = None,
        settings: Settings | None = None,
        context: Any = None,
    ) -> TuningRequest:
        """Ask a question, with a picture or without. The server computes no rewards for it.

        Raises:
            RequestError: An argument is invalid.

        >>> TuningRequest.query("photo.jpg", "How many people?")
        TuningRequest(skill='query', fields={'question': 'How many people?'})
        """
        request = query_request(
            image,
            question,
            stream=False,
            reasoning=reasoning,
            spatial_refs=spatial_refs,
            settings=settings,
            model=None,
        )
        return cls._of(request, image, None, context)

    @classmethod
    def detect(
        cls,
        image: Any,
        object: str,
        *,
        ground_truth: Mapping[str, Any] | None = None,
        settings: Settings | None = None,
        context: Any = None,
    ) -> TuningRequest:
        """Ask for boxes round objects.

        Args:
            image: The picture.
            object: A name of the objects.
            ground_truth: ``{"boxes": [...]}``, each a `Region` or a mapping like one. With
                it the server computes rewards.
            settings: Sampling settings; `max_objects` limits the number of boxes.
            context: Any value, to tell requests apart.

        Raises:
            RequestError: An argument is invalid.

        >>> TuningRequest.detect("photo.jpg", "person", ground_truth={"boxes": []})
        TuningRequest(skill='detect', fields={'object': 'person'})
        """
        request = detect_request(image, object, settings=settings, model=None)
        return cls._of(request, image, ground_truth, context)

    @classmethod
    def point(
        cls,
        image: Any,
        object: str,
        *,
        ground_truth: Mapping[str, Any] | None = None,
        spatial_refs: SpatialRefs | None = None,
        settings: Settings | None = None,
        context: Any = None,
    ) -> TuningRequest:
        """Ask for points in objects.

        Args:
            image: The picture.
            object: A name of the objects.
            ground_truth: ``{"points": [...]}``, each a `Point` or a mapping like one, or
                ``{"boxes": [...]}`` that right points lie in. With it the server computes
                rewards.
            spatial_refs: Places that `object` refers to.
            settings: Sampling settings; `max_objects` limits the number of points.
            context: Any value, to tell requests apart.

        Raises:
            RequestError: An argument is invalid.
        """
        request = point_request(
            image, object, spatial_refs=spatial_refs, settings=settings, model=None
        )
        return cls._of(request, image, ground_truth, context)

    @classmethod
    def _of(
        cls, request: Request, image: Any, ground_truth: Mapping[str, Any] | None, context: Any
    ) -> TuningRequest:
        if ground_truth is not None and not isinstance(ground_truth, Mapping):
            raise RequestError(f"ground_truth must be a mapping, not {ground_truth!r:.100}")
        left_out = ("image_url", "stream")
        fields = {key: value for key, value in request.payload.items() if key not in left_out}
        assert request.skill is not None  # noqa: S101 - for the type checker
        return cls(request.skill, fields, image, ground_truth, context)

    def __repr__(self) -> str:
        return f"TuningRequest(skill={self.skill!r}, fields={self.fields!r})"

    def payload(self) -> dict[str, Any]:
        """Return the fields to send, with the picture to be encoded."""
        picture = {} if self.image is None else {"image_url": Picture(self.image)}
        return {"skill": self.skill, **self.fields, **picture}


class TrainGroup(msgspec.Struct, frozen=True, eq=False):
    """An example for a training step: one request with rewards (`rl`) or a target (`sft`)."""

    payload: dict[str, Any]
    """The fields to send."""

    @classmethod
    def rl(cls, rollouts: Rollouts, rewards: Iterable[float] | None = None) -> TrainGroup:
        """Learn which rollouts are better.

        Args:
            rollouts: All answers to one request, as the server returned them.
            rewards: A reward for each, in the same order; None is the server's rewards.

        Raises:
            RequestError: There are no rewards, or not one for each rollout.

        >>> TrainGroup.rl(Rollouts(rollouts=[Rollout()]), rewards=[0.5])
        TrainGroup(mode='rl')
        """
        found = rollouts.rewards if rewards is None else rewards
        if found is None:
            raise RequestError("the rollouts came without rewards: pass rewards=")
        numbers = [finite_number("a reward", reward) for reward in found]
        if len(numbers) != len(rollouts.rollouts) or not numbers:
            raise RequestError(
                f"there are {len(numbers)} rewards for {len(rollouts.rollouts)} rollouts"
            )
        return cls(
            {
                "mode": "rl",
                "request": rollouts.request,
                # As the server sent them, with fields that this version doesn't know.
                "rollouts": [rollout.raw for rollout in rollouts.rollouts],
                "rewards": numbers,
            }
        )

    @classmethod
    def sft(cls, request: TuningRequest, target: Mapping[str, Any]) -> TrainGroup:
        """Learn the right answer.

        Args:
            request: The request; its ground truth is not sent.
            target: The answer: ``{"answer": ...}`` for a query, with ``"reasoning"`` if
                the request has `reasoning`; ``{"points": [...]}`` or ``{"boxes": [...]}``
                for a point; ``{"boxes": [...]}`` for detect.

        Raises:
            RequestError: The target is not a mapping, or is empty.

        >>> TrainGroup.sft(TuningRequest.query(question="How many?"), {"answer": "two"})
        TrainGroup(mode='sft')
        """
        if not isinstance(request, TuningRequest):
            raise RequestError(f"request must be a TuningRequest, not {request!r:.100}")
        if not isinstance(target, Mapping) or not target:
            raise RequestError(f"target must be a mapping that is not empty, not {target!r:.100}")
        return cls({"mode": "sft", "request": request.payload(), "target": dict(target)})

    def __repr__(self) -> str:
        return f"TrainGroup(mode={self.payload.get('mode')!r})"  # the rest holds pictures


def create_request(name: str, rank: int) -> Request:
    """Check the arguments of ``create`` and return its request."""
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"name must be a string that is not empty, not {name!r}")
    if not is_count(rank) or rank not in RANKS:
        raise RequestError(f"rank must be one of {', '.join(map(str, RANKS))}, not {rank!r}")
    return Request(None, "/tuning/finetunes", {"name": name, "rank": rank})


def rollouts_request(finetune_id: str, request: TuningRequest, num_rollouts: int) -> Request:
    """Check the arguments of ``rollouts`` and return its request."""
    if not isinstance(request, TuningRequest):
        raise RequestError(f"request must be a TuningRequest, not {request!r:.100}")
    check_count("num_rollouts", num_rollouts, most=MAX_ROLLOUTS)
    payload = {
        "finetune_id": finetune_id,
        "num_rollouts": num_rollouts,
        "request": request.payload(),
        "ground_truth": request.ground_truth,
    }
    return Request(None, "/tuning/rollouts", payload)


def train_step_request(
    finetune_id: str,
    groups: Iterable[TrainGroup | Mapping[str, Any]],
    lr: float,
    more: Mapping[str, Any],
) -> Request:
    """Check the arguments of ``train_step`` and return its request."""
    if isinstance(groups, (str, Mapping, TrainGroup)) or not isinstance(groups, Iterable):
        raise RequestError(f"groups must be a list of groups, not {groups!r:.100}")
    payloads = [_group_payload(group) for group in groups]
    if not payloads:
        raise RequestError("groups must not be empty")
    if finite_number("lr", lr) <= 0:
        raise RequestError(f"lr must be over 0, not {lr!r}")
    payload = {"finetune_id": finetune_id, "groups": payloads, "lr": lr, **more}
    return Request(None, "/tuning/train_step", payload, repeatable=False)


def _group_payload(group: Any) -> dict[str, Any]:
    if isinstance(group, TrainGroup):
        return group.payload
    if not isinstance(group, Mapping):
        raise RequestError(f"a group must be a TrainGroup or a mapping, not {group!r:.100}")
    tries = group.get("rollouts")
    if isinstance(tries, (list, tuple)):  # with fields that this version doesn't know
        tries = [(isinstance(each, Rollout) and each.raw) or each for each in tries]
        group = {**group, "rollouts": tries}
    request = group.get("request")
    if isinstance(request, TuningRequest):
        return {**group, "request": request.payload()}
    if isinstance(request, Mapping) and request.get("image") is not None:  # as the SDK takes it
        rest = {key: value for key, value in request.items() if key != "image"}
        return {**group, "request": {**rest, "image_url": Picture(request["image"])}}
    return dict(group)


def metrics_request(path: str, step: int, metrics: Mapping[str, float]) -> Request:
    """Check the arguments of ``log_metrics`` and return its request."""
    check_count("step", step, least=0)
    if not isinstance(metrics, Mapping) or not metrics:
        raise RequestError(f"metrics must be a mapping that is not empty, not {metrics!r:.100}")
    numbers = {name: finite_number(f"metrics[{name!r}]", value) for name, value in metrics.items()}
    return Request(None, path, {"step": step, "metrics": numbers})


def finite_number(what: str, value: Any) -> float:
    """Return a number of any type as a float.

    Raises:
        RequestError: The value is not a number, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{what} must be a number, not {value!r:.100}") from error
    if isinstance(value, (str, bytes, bool)) or not math.isfinite(number):
        raise RequestError(f"{what} must be a finite number, not {value!r:.100}")
    return number


def read_finetune(raw: Mapping[str, Any], **known: Any) -> Finetune:
    """Read a finetune; newer servers wrap it in ``{"finetune": ...}``.

    Raises:
        ServerError: The server's record has no id.
    """
    inner = raw.get("finetune")
    return read_value(Finetune, inner if isinstance(inner, Mapping) else raw, raw=raw, **known)


def read_rollouts(raw: Mapping[str, Any]) -> Rollouts:
    """Read rollouts."""
    found = raw.get("rollouts")
    return read_value(
        Rollouts,
        raw,
        raw=raw,
        rollouts=list(map(_read_rollout, found if isinstance(found, list) else ())),
    )


def _read_rollout(raw: Any) -> Rollout:
    output = raw.get("output") if isinstance(raw, Mapping) else None
    reasoning = decode_reasoning(output.get("reasoning")) if isinstance(output, Mapping) else None
    return read_value(
        Rollout,
        raw,
        raw=raw,
        output=read_value(RolloutOutput, output, raw=output or {}, reasoning=reasoning),
    )
