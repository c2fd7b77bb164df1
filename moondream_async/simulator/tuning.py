"""The tuning API, under ``/v1/tuning``. Nothing is trained; steps are counted.

What a client can know before it asks is not checked again here.

Rollouts are the simulator's own answers: the first is the right one, and each
further one is a little worse, so that rewards differ.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Literal

import msgspec

from .dialects import Answer, Body, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Reply, Route
from .storage import Storage, make_id, take_page
from .validation import RefusedError, read_body, read_typed

_SKILLS = ("query", "point", "detect")
_NEAR = 0.05  # of the picture: a point this close to the truth is right
_PAGE = 20


class CreateBody(msgspec.Struct, frozen=True):
    """The body that creates a finetune."""

    name: str
    rank: int


class PointTruth(msgspec.Struct, frozen=True):
    """A place where an object is."""

    x: float
    y: float


class BoxTruth(msgspec.Struct, frozen=True):
    """A box that an object fills."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class GroundTruth(msgspec.Struct, frozen=True):
    """What the right answer is, for rewards."""

    points: list[PointTruth] = []
    boxes: list[BoxTruth] = []


class RolloutsBody(msgspec.Struct, frozen=True):
    """The body that asks for rollouts."""

    finetune_id: str
    num_rollouts: int
    request: dict[str, Any]
    ground_truth: GroundTruth | None = None


class Group(msgspec.Struct, frozen=True):
    """Part of a training step."""

    request: dict[str, Any]
    mode: Literal["rl", "sft"] = "rl"
    rewards: list[float] = []


class TrainStepBody(msgspec.Struct, frozen=True):
    """The body of a training step."""

    finetune_id: str
    groups: list[Group]


class MetricsBody(msgspec.Struct, frozen=True):
    """The body that logs a caller's own metrics."""

    step: int
    metrics: dict[str, float]


class Finetune(msgspec.Struct):
    """A finetune, and how far it is trained."""

    finetune_id: str
    name: str
    rank: int
    created_at_ms: int
    updated_at_ms: int
    step: int = 0
    checkpoints: dict[int, Body] = {}
    deleted_steps: set[int] = set()

    def body(self) -> Body:
        """Return it as the API sends it."""
        return {
            "finetune_id": self.finetune_id,
            "name": self.name,
            "rank": self.rank,
            "created_at_ms": self.created_at_ms,
            "updated_at_ms": self.updated_at_ms,
        }


class Tuning:
    """The finetunes of one server."""

    def __init__(self, dialect: Dialect, gallery: Gallery, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/tuning"
        self._gallery = gallery
        self._storage = storage
        self._finetunes: dict[str, Finetune] = {}
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints."""
        one = f"{self._path}/finetunes/{{id}}"
        return [
            Route("POST", f"{self._path}/finetunes", self._create),
            Route("GET", f"{self._path}/finetunes", self._list),
            Route("GET", one, self._get),
            Route("DELETE", one, self._delete),
            Route("POST", f"{self._path}/rollouts", self._roll_out),
            Route("POST", f"{self._path}/train_step", self._train),
            Route("POST", f"{one}/metrics", self._log_metrics),
            Route("GET", f"{one}/checkpoints", self._list_checkpoints),
            Route("POST", f"{one}/checkpoints/save", self._save_checkpoint),
            Route("DELETE", f"{one}/checkpoints/{{step}}", self._delete_checkpoint),
            Route("GET", f"{one}/checkpoints/{{step}}/download", self._download_checkpoint),
        ]

    async def _create(self, received: ReceivedRequest) -> Reply:
        body = read_typed(received.body, CreateBody)
        for finetune in self._finetunes.values():
            if finetune.name == body.name:
                if finetune.rank != body.rank:
                    raise RefusedError(
                        f"Finetune {body.name!r} exists with rank {finetune.rank}", status=409
                    )
                return Reply(body={"finetune_id": finetune.finetune_id})
        self._created += 1
        now = _now_ms()
        finetune = Finetune(make_id(self._created), body.name, body.rank, now, now)
        self._finetunes[finetune.finetune_id] = finetune
        return Reply(body={"finetune_id": finetune.finetune_id})

    async def _list(self, received: ReceivedRequest) -> Reply:
        finetunes = [finetune.body() for finetune in self._finetunes.values()]
        return Reply(body=take_page("finetunes", finetunes, received.query, default=_PAGE))

    async def _get(self, received: ReceivedRequest) -> Reply:
        return Reply(body={"finetune": self._find(received.params["id"]).body()})

    async def _delete(self, received: ReceivedRequest) -> Reply:
        del self._finetunes[self._find(received.params["id"]).finetune_id]
        return Reply(body={"ok": True})

    async def _roll_out(self, received: ReceivedRequest) -> Reply:
        body = read_typed(received.body, RolloutsBody)
        self._find(body.finetune_id)
        name = body.request.get("skill")
        if name not in _SKILLS:
            raise RefusedError(f"skill must be one of {', '.join(_SKILLS)}", param="request.skill")
        skill = SKILLS[name]
        request = read_body(body.request, skill.body, needs_image=name != "query")
        picture = await self._gallery.look(request.image_url) if request.image_url else None
        answer = skill.solve(request, picture)
        # At temperature 0 a model says the same each time.
        varies = not request.settings or request.settings.temperature != 0
        outputs = [_worsen(answer, number * varies) for number in range(body.num_rollouts)]
        rewards = None
        if body.ground_truth is not None:
            rewards = [_reward(output, body.ground_truth) for output in outputs]
        rollouts = [_describe_rollout(answer, output) for output in outputs]
        return Reply(body={"request": body.request, "rollouts": rollouts, "rewards": rewards})

    async def _train(self, received: ReceivedRequest) -> Reply:
        body = read_typed(received.body, TrainStepBody)
        finetune = self._find(body.finetune_id)
        rewards = [reward for group in body.groups for reward in group.rewards]
        tuned = any(group.mode == "sft" for group in body.groups)
        finetune.step += 1
        finetune.updated_at_ms = _now_ms()
        return Reply(
            body={
                "step": finetune.step,
                "applied": True,
                "kl": 0.01 if rewards else None,
                "router_kl": 0.001 if rewards else None,
                "grad_norm": 1.0,
                "reward_mean": statistics.fmean(rewards) if rewards else None,
                "reward_std": statistics.pstdev(rewards) if rewards else None,
                "sft_loss": 1 / finetune.step if tuned else None,
            }
        )

    async def _log_metrics(self, received: ReceivedRequest) -> Reply:
        self._find(received.params["id"])
        read_typed(received.body, MetricsBody)
        return Reply(body={"ok": True})

    async def _list_checkpoints(self, received: ReceivedRequest) -> Reply:
        saved = list(self._find(received.params["id"]).checkpoints.values())
        return Reply(body=take_page("checkpoints", saved, received.query))

    async def _save_checkpoint(self, received: ReceivedRequest) -> Reply:
        finetune = self._find(received.params["id"])
        if finetune.step == 0:
            raise RefusedError("No checkpoint is available before a step", status=404)
        checkpoint = finetune.checkpoints.get(finetune.step)
        if checkpoint is None:
            self._created += 1
            now = _now_ms()
            checkpoint = finetune.checkpoints[finetune.step] = {
                "checkpoint_id": make_id(self._created),
                "finetune_id": finetune.finetune_id,
                "step": finetune.step,
                "created_at_ms": now,
                "updated_at_ms": now,
            }
        return Reply(body={"ok": True, "checkpoint": checkpoint})

    async def _delete_checkpoint(self, received: ReceivedRequest) -> Reply:
        finetune, step = self._find_checkpoint(received)
        del finetune.checkpoints[step]
        finetune.deleted_steps.add(step)
        return Reply(body={"ok": True})

    async def _download_checkpoint(self, received: ReceivedRequest) -> Reply:
        finetune, step = self._find_checkpoint(received)
        name = f"{finetune.finetune_id}-{step}.safetensors"
        self._storage.put(name, b"No weights: nothing was trained.")
        return Reply(body={"url": self._storage.url(received.origin, name), "expires_in": 3600})

    def _find(self, finetune_id: str) -> Finetune:
        finetune = self._finetunes.get(finetune_id)
        if finetune is None:
            raise RefusedError("No such finetune", status=404, param="finetune_id")
        return finetune

    def _find_checkpoint(self, received: ReceivedRequest) -> tuple[Finetune, int]:
        finetune = self._find(received.params["id"])
        text = received.params["step"]
        step = int(text) if text.isdecimal() else 0
        if step in finetune.checkpoints:
            return finetune, step
        if step in finetune.deleted_steps:
            raise RefusedError("The checkpoint was deleted", status=410)
        raise RefusedError("No such checkpoint", status=404)


def _worsen(answer: Answer, steps: int) -> Body:
    """Return a skill's output, made worse: words are lost, places slide to the right."""
    shift = 0.02 * steps
    output = dict(answer.result)
    if "answer" in output:
        output["answer"] = "".join(answer.pieces[: max(1, len(answer.pieces) - steps)])
        if answer.reasoning is not None:
            output["reasoning"] = answer.reasoning
    for kind in ("points", "objects"):
        if kind in output:
            output[kind] = [
                {
                    side: min(1.0, round(value + shift, 4)) if side.startswith("x") else value
                    for side, value in found.items()
                }
                for found in output[kind]
            ]
    return output


def _describe_rollout(answer: Answer, output: Body) -> Body:
    return {
        "skill": answer.skill,
        "finish_reason": answer.finish_reason,
        "output": output,
        "answer_tokens": list(range(answer.tokens)),
        "thinking_tokens": [],
        "has_answer_separator": False,
        "coords": [],
        "sizes": [],
    }


def _reward(output: Body, truth: GroundTruth) -> float:
    """Return how right an output is, 0-1: what was found and is true, of all found or true."""
    if "objects" in output:
        boxes = [BoxTruth(**box) for box in output["objects"]]
        right = sum(
            max((_overlap(box, other) for other in boxes), default=0.0) for box in truth.boxes
        )
        return right / max(len(boxes), len(truth.boxes), 1)
    points = [PointTruth(**point) for point in output["points"]]
    hits = sum(any(_is_near(point, true) for point in points) for true in truth.points)
    hits += sum(any(_contains(box, point) for point in points) for box in truth.boxes)
    return hits / max(len(points), len(truth.points) + len(truth.boxes), 1)


def _overlap(one: BoxTruth, other: BoxTruth) -> float:
    """Return the boxes' intersection over their union."""
    width = min(one.x_max, other.x_max) - max(one.x_min, other.x_min)
    height = min(one.y_max, other.y_max) - max(one.y_min, other.y_min)
    common = max(0.0, width) * max(0.0, height)
    union = _size(one) + _size(other) - common
    return common / union if union else 0.0


def _size(box: BoxTruth) -> float:
    return (box.x_max - box.x_min) * (box.y_max - box.y_min)


def _is_near(one: PointTruth, other: PointTruth) -> bool:
    return abs(one.x - other.x) <= _NEAR and abs(one.y - other.y) <= _NEAR


def _contains(box: BoxTruth, point: PointTruth) -> bool:
    return box.x_min <= point.x <= box.x_max and box.y_min <= point.y <= box.y_max


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
