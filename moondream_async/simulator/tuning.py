"""The tuning API, under ``/v1/tuning``. Nothing is trained; steps are counted.

Values that the client checks are not checked again here.

Rollouts are the simulator's own answers: the first is right, and each later one is a
little worse, so that rewards differ.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from typing import Annotated, Literal

import msgspec

from .dialects import Dialect
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Answer, Body, Endpoint, Route
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


class _Box(msgspec.Struct, frozen=True):
    x_min: float
    y_min: float
    x_max: float
    y_max: float

    @property
    def size(self) -> float:
        return max(0.0, self.x_max - self.x_min) * max(0.0, self.y_max - self.y_min)

    def holds(self, point: _Point) -> bool:
        return self.x_min <= point.x <= self.x_max and self.y_min <= point.y <= self.y_max

    def overlap(self, other: _Box) -> float:
        """Return the intersection over the union."""
        starts = max(self.x_min, other.x_min), max(self.y_min, other.y_min)
        common = _Box(*starts, min(self.x_max, other.x_max), min(self.y_max, other.y_max)).size
        return common / ((self.size + other.size - common) or 1)


class _Truth(msgspec.Struct, frozen=True):
    points: list[_Point] = []
    boxes: list[_Box] = []

    def reward(self, output: Body) -> float:
        """Return a score, 0-1: the places found and true, of all places found or true."""
        boxes = msgspec.convert(output.get("objects", ()), list[_Box])
        points = msgspec.convert(output.get("points", ()), list[_Point])
        if "objects" in output:
            hits = [max(map(box.overlap, boxes), default=0.0) for box in self.boxes]
        else:
            near = [_Box(p.x - _NEAR, p.y - _NEAR, p.x + _NEAR, p.y + _NEAR) for p in self.points]
            hits = [any(map(box.holds, points)) for box in near + self.boxes]
        return sum(hits) / max(len(boxes) + len(points), len(hits), 1)


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


class Tuning:
    """The finetunes of one server."""

    def __init__(self, dialect: Dialect, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/tuning"
        self._storage = storage
        self._finetunes: dict[str, Body] = {}  # as the API sends them
        self._steps: Counter[str] = Counter()
        self._saved: dict[tuple[str, str], Body | None] = {}  # by finetune and step; None: deleted
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints."""
        every, one, saved = "finetunes", "finetunes/{id}", "finetunes/{id}/checkpoints"
        endpoints: tuple[tuple[str, str, Endpoint], ...] = (
            ("POST", every, self._create),
            ("GET", every, self._list),
            ("GET", one, lambda received: {"finetune": self._find(received)}),
            ("DELETE", one, self._delete),
            ("POST", "rollouts", self._roll_out),
            ("POST", "train_step", self._train),
            ("POST", f"{one}/metrics", lambda received: {"ok": bool(self._find(received))}),
            ("GET", saved, self._list_checkpoints),
            ("POST", f"{saved}/save", self._save_checkpoint),
            ("DELETE", f"{saved}/{{step}}", self._delete_checkpoint),
            ("GET", f"{saved}/{{step}}/download", self._download_checkpoint),
        )
        return [Route(method, f"{self._path}/{path}", do) for method, path, do in endpoints]

    def _create(self, received: ReceivedRequest) -> Body:
        wanted = read_typed(received.body, _Create)
        named = [each for each in self._finetunes.values() if each["name"] == wanted.name]
        made = named[0] if named else self._make("finetune_id", name=wanted.name, rank=wanted.rank)
        if made["rank"] != wanted.rank:
            message = f"Finetune {wanted.name!r} exists with rank {made['rank']}"
            raise RefusedError(message, status=409)
        self._finetunes[made["finetune_id"]] = made
        return {"finetune_id": made["finetune_id"]}

    def _list(self, received: ReceivedRequest) -> Body:
        return take_page("finetunes", [*self._finetunes.values()], received.query, default=20)

    def _delete(self, received: ReceivedRequest) -> Body:
        del self._finetunes[self._find(received)["finetune_id"]]
        return {"ok": True}

    async def _roll_out(self, received: ReceivedRequest) -> Body:
        body = read_typed(received.body, _Rollouts)
        self._find(received)
        name = body.request.get("skill")
        if name not in _SKILLS:
            raise RefusedError(f"skill must be one of {', '.join(_SKILLS)}", param="request.skill")
        request = read_body(body.request, SKILLS[name].body, needs_image=name != "query")
        answer = await received.find(SKILLS[name].answer, request)
        # At temperature 0 a model says the same each time.
        varies = not request.settings or request.settings.temperature != 0
        outputs = [_worsen(answer, number * varies) for number in range(body.num_rollouts)]
        truth = body.ground_truth
        rollout = {
            "skill": name,
            "finish_reason": answer.finish_reason,
            "answer_tokens": list(range(answer.tokens)),
            "thinking_tokens": [],
            "has_answer_separator": False,
            "coords": [],
            "sizes": [],
        }
        return {
            "request": body.request,
            "rollouts": [rollout | {"output": output} for output in outputs],
            "rewards": truth and [truth.reward(output) for output in outputs],
        }

    def _train(self, received: ReceivedRequest) -> Body:
        groups = read_typed(received.body, _TrainStep).groups
        finetune = self._find(received)
        rewards = [reward for group in groups for reward in group.rewards]
        tuned = any(group.mode == "sft" for group in groups)
        self._steps[finetune["finetune_id"]] += 1
        step = self._steps[finetune["finetune_id"]]
        finetune["updated_at_ms"] = _now_ms()
        return {
            "step": step,
            "applied": True,
            "kl": 0.01 if rewards else None,
            "router_kl": 0.001 if rewards else None,
            "grad_norm": 1.0,
            "reward_mean": statistics.mean(rewards) if rewards else None,
            "reward_std": statistics.pstdev(rewards) if rewards else None,
            "sft_loss": 1 / step if tuned else None,
        }

    def _list_checkpoints(self, received: ReceivedRequest) -> Body:
        finetune_id = self._find(received)["finetune_id"]
        saved = [each for (of, _), each in self._saved.items() if each and of == finetune_id]
        return take_page("checkpoints", saved, received.query)

    def _save_checkpoint(self, received: ReceivedRequest) -> Body:
        finetune_id = self._find(received)["finetune_id"]
        step = self._steps[finetune_id]
        if step == 0:
            raise RefusedError("No checkpoint is available before a step", status=404)
        saved = self._saved.get((finetune_id, str(step)))
        if saved is None:
            saved = self._make("checkpoint_id", finetune_id=finetune_id, step=step)
            self._saved[finetune_id, str(step)] = saved
        return {"ok": True, "checkpoint": saved}

    def _delete_checkpoint(self, received: ReceivedRequest) -> Body:
        checkpoint = self._find_checkpoint(received)
        self._saved[checkpoint["finetune_id"], str(checkpoint["step"])] = None
        return {"ok": True}

    def _download_checkpoint(self, received: ReceivedRequest) -> Body:
        checkpoint = self._find_checkpoint(received)
        name = f"{checkpoint['finetune_id']}-{checkpoint['step']}.safetensors"
        url = self._storage.put(received.origin, name, b"No weights: nothing was trained.")
        return {"url": url, "expires_in": 3600}

    def _make(self, kind: str, **fields: object) -> Body:
        """Return a new object: its id, when it was made, and more fields."""
        self._created += 1
        now = _now_ms()
        return {kind: make_id(self._created), "created_at_ms": now, "updated_at_ms": now, **fields}

    def _find(self, received: ReceivedRequest) -> Body:
        """Return the finetune that a request names, in its path or in its body."""
        finetune_id = received.params.get("id") or received.body["finetune_id"]
        if finetune_id not in self._finetunes:
            raise RefusedError("No such finetune", status=404, param="finetune_id")
        return self._finetunes[finetune_id]

    def _find_checkpoint(self, received: ReceivedRequest) -> Body:
        key = self._find(received)["finetune_id"], received.params["step"]
        if key not in self._saved:
            raise RefusedError("No such checkpoint", status=404)
        checkpoint = self._saved[key]
        if checkpoint is None:
            raise RefusedError("The checkpoint was deleted", status=410)
        return checkpoint


def _worsen(answer: Answer, steps: int) -> Body:
    """Return an answer's fields, made worse: it loses words, or its places move to the right."""
    output = answer.fields()
    if "answer" in output:
        output["answer"] = "".join(answer.pieces[: max(1, len(answer.pieces) - steps)])
    for kind in output.keys() & {"points", "objects"}:
        output[kind] = [dict(place) for place in output[kind]]
        for place in output[kind]:
            for side in place.keys() & {"x", "x_min", "x_max"}:
                place[side] = min(1.0, round(place[side] + 0.02 * steps, 4))
    return output


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
