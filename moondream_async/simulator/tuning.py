"""The tuning API, under ``/v1/tuning``. Nothing is trained; steps are counted.

Values that the client checks are not checked again here.

Rollouts are the simulator's own answers: the first is right, and each later one is a
little worse, so that rewards differ.
"""

from __future__ import annotations

import re
import statistics
import time
from typing import Annotated, Literal

import msgspec

from .dialects import Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Answer, Body, Route
from .storage import Storage, make_id, take_page
from .validation import RefusedError, read_body, read_typed

_SKILLS = ("query", "point", "detect")
_NEAR = 0.05  # of the picture: a point this close to the truth is right


class _Create(msgspec.Struct, frozen=True):
    name: str
    rank: int


class _Point(msgspec.Struct, frozen=True):
    x: float
    y: float

    def is_in(self, box: _Box) -> bool:
        return box.x_min <= self.x <= box.x_max and box.y_min <= self.y <= box.y_max

    def around(self) -> _Box:
        return _Box(self.x - _NEAR, self.y - _NEAR, self.x + _NEAR, self.y + _NEAR)


class _Box(msgspec.Struct, frozen=True):
    x_min: float
    y_min: float
    x_max: float
    y_max: float

    def size(self) -> float:
        return max(0.0, self.x_max - self.x_min) * max(0.0, self.y_max - self.y_min)

    def overlap(self, other: _Box) -> float:
        """Return the intersection over the union."""
        left, right = max(self.x_min, other.x_min), min(self.x_max, other.x_max)
        top, bottom = max(self.y_min, other.y_min), min(self.y_max, other.y_max)
        common = _Box(left, top, right, bottom).size()
        union = self.size() + other.size() - common
        return common / union if union else 0.0


class _Truth(msgspec.Struct, frozen=True):
    points: list[_Point] = []
    boxes: list[_Box] = []

    def reward(self, output: Body) -> float:
        """Return a score, 0-1: the places found and true, of all places found or true."""
        if "objects" in output:
            found = msgspec.convert(output["objects"], list[_Box])
            overlaps = [max((box.overlap(one) for one in found), default=0.0) for box in self.boxes]
            return sum(overlaps) / max(len(found), len(self.boxes), 1)
        points = msgspec.convert(output.get("points", ()), list[_Point])
        wanted = [point.around() for point in self.points] + self.boxes
        hits = sum(any(point.is_in(box) for point in points) for box in wanted)
        return hits / max(len(points), len(wanted), 1)


class _Rollouts(msgspec.Struct, frozen=True):
    finetune_id: str
    num_rollouts: Annotated[int, msgspec.Meta(ge=1, le=16)]
    request: Body
    ground_truth: _Truth | None = None


class _Group(msgspec.Struct, frozen=True):
    request: Body
    mode: Literal["rl", "sft"] = "rl"
    rewards: list[float] = []


class _TrainStep(msgspec.Struct, frozen=True):
    finetune_id: str
    groups: list[_Group]


class _Metrics(msgspec.Struct, frozen=True):
    step: int
    metrics: dict[str, float]


class _Finetune:
    """A finetune, its steps and its checkpoints."""

    def __init__(self, number: int, name: str, rank: int) -> None:
        self.body: Body = {"finetune_id": make_id(number), "name": name, "rank": rank, **_times()}
        self.step = 0
        self.checkpoints: dict[int, Body | None] = {}  # None is one that was deleted


class Tuning:
    """The finetunes of one server."""

    def __init__(self, dialect: Dialect, gallery: Gallery, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/tuning"
        self._gallery = gallery
        self._storage = storage
        self._finetunes: dict[str, _Finetune] = {}
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints."""
        every, one = f"{self._path}/finetunes", f"{self._path}/finetunes/{{id}}"
        saved = f"{one}/checkpoints"
        return [
            Route("POST", every, self._create),
            Route("GET", every, self._list),
            Route("GET", one, self._get),
            Route("DELETE", one, self._delete),
            Route("POST", f"{self._path}/rollouts", self._roll_out),
            Route("POST", f"{self._path}/train_step", self._train),
            Route("POST", f"{one}/metrics", self._log_metrics),
            Route("GET", saved, self._list_checkpoints),
            Route("POST", f"{saved}/save", self._save_checkpoint),
            Route("DELETE", f"{saved}/{{step}}", self._delete_checkpoint),
            Route("GET", f"{saved}/{{step}}/download", self._download_checkpoint),
        ]

    async def _create(self, received: ReceivedRequest) -> Body:
        body = read_typed(received.body, _Create)
        for finetune_id, finetune in self._finetunes.items():
            if finetune.body["name"] == body.name:
                rank = finetune.body["rank"]
                if rank != body.rank:
                    message = f"Finetune {body.name!r} exists with rank {rank}"
                    raise RefusedError(message, status=409)
                return {"finetune_id": finetune_id}
        self._created += 1
        finetune = _Finetune(self._created, body.name, body.rank)
        self._finetunes[finetune.body["finetune_id"]] = finetune
        return {"finetune_id": finetune.body["finetune_id"]}

    async def _list(self, received: ReceivedRequest) -> Body:
        finetunes = [finetune.body for finetune in self._finetunes.values()]
        return take_page("finetunes", finetunes, received.query, default=20)

    async def _get(self, received: ReceivedRequest) -> Body:
        return {"finetune": self._find(received.params["id"]).body}

    async def _delete(self, received: ReceivedRequest) -> Body:
        self._find(received.params["id"])
        del self._finetunes[received.params["id"]]
        return {"ok": True}

    async def _roll_out(self, received: ReceivedRequest) -> Body:
        body = read_typed(received.body, _Rollouts)
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
        truth = body.ground_truth
        rewards = None if truth is None else [truth.reward(output) for output in outputs]
        rollout = {
            "skill": name,
            "finish_reason": answer.finish_reason,
            "answer_tokens": list(range(answer.tokens)),
            "thinking_tokens": [],
            "has_answer_separator": False,
            "coords": [],
            "sizes": [],
        }
        rollouts = [rollout | {"output": output} for output in outputs]
        return {"request": body.request, "rollouts": rollouts, "rewards": rewards}

    async def _train(self, received: ReceivedRequest) -> Body:
        body = read_typed(received.body, _TrainStep)
        finetune = self._find(body.finetune_id)
        rewards = [reward for group in body.groups for reward in group.rewards]
        tuned = any(group.mode == "sft" for group in body.groups)
        finetune.step += 1
        finetune.body["updated_at_ms"] = _times()["updated_at_ms"]
        return {
            "step": finetune.step,
            "applied": True,
            "kl": 0.01 if rewards else None,
            "router_kl": 0.001 if rewards else None,
            "grad_norm": 1.0,
            "reward_mean": statistics.mean(rewards) if rewards else None,
            "reward_std": statistics.pstdev(rewards) if rewards else None,
            "sft_loss": 1 / finetune.step if tuned else None,
        }

    async def _log_metrics(self, received: ReceivedRequest) -> Body:
        self._find(received.params["id"])
        read_typed(received.body, _Metrics)
        return {"ok": True}

    async def _list_checkpoints(self, received: ReceivedRequest) -> Body:
        finetune = self._find(received.params["id"])
        saved = [checkpoint for checkpoint in finetune.checkpoints.values() if checkpoint]
        return take_page("checkpoints", saved, received.query)

    async def _save_checkpoint(self, received: ReceivedRequest) -> Body:
        finetune = self._find(received.params["id"])
        step = finetune.step
        if step == 0:
            raise RefusedError("No checkpoint is available before a step", status=404)
        if not finetune.checkpoints.get(step):
            self._created += 1
            finetune.checkpoints[step] = {
                "checkpoint_id": make_id(self._created),
                "finetune_id": received.params["id"],
                "step": step,
                **_times(),
            }
        return {"ok": True, "checkpoint": finetune.checkpoints[step]}

    async def _delete_checkpoint(self, received: ReceivedRequest) -> Body:
        finetune, step = self._find_checkpoint(received)
        finetune.checkpoints[step] = None
        return {"ok": True}

    async def _download_checkpoint(self, received: ReceivedRequest) -> Body:
        _, step = self._find_checkpoint(received)
        name = f"{received.params['id']}-{step}.safetensors"
        self._storage.put(name, b"No weights: nothing was trained.")
        return {"url": self._storage.url(received.origin, name), "expires_in": 3600}

    def _find(self, finetune_id: str) -> _Finetune:
        finetune = self._finetunes.get(finetune_id)
        if finetune is None:
            raise RefusedError("No such finetune", status=404, param="finetune_id")
        return finetune

    def _find_checkpoint(self, received: ReceivedRequest) -> tuple[_Finetune, int]:
        finetune = self._find(received.params["id"])
        text = received.params["step"]
        step = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
        if finetune.checkpoints.get(step):
            return finetune, step
        if step in finetune.checkpoints:
            raise RefusedError("The checkpoint was deleted", status=410)
        raise RefusedError("No such checkpoint", status=404)


def _worsen(answer: Answer, steps: int) -> Body:
    """Return a skill's output, made worse: it loses words, or its places move to the right."""
    output = dict(answer.result)
    if "answer" in output:
        output["answer"] = "".join(answer.pieces[: max(1, len(answer.pieces) - steps)])
        if answer.reasoning is not None:
            output["reasoning"] = answer.reasoning
    for kind in output.keys() & {"points", "objects"}:
        output[kind] = [
            {
                side: min(1.0, round(value + 0.02 * steps, 4)) if side.startswith("x") else value
                for side, value in found.items()
            }
            for found in output[kind]
        ]
    return output


def _times() -> dict[str, int]:
    now = time.time_ns() // 1_000_000
    return {"created_at_ms": now, "updated_at_ms": now}
