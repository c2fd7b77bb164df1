"""Finetunes: train the cloud's model on your own tasks.

A step of reinforcement: the model answers several times, each attempt is rewarded, and the model
learns which were better::

    async with md.MoondreamClient() as client:
        finetune = await client.tuning.create("find-doors", rank=16)
        request = md.TuningRequest.point(
            "hall.jpg", "door handle", ground_truth={"points": [md.Point(0.31, 0.52)]}
        )
        rollouts = await client.tuning.rollouts(finetune, request, num_rollouts=8)
        step = await client.tuning.train_step(finetune, [md.TrainGroup.rl(rollouts)])
        print(step.step, step.reward_mean)
        checkpoint = await client.tuning.save_checkpoint(finetune)
        print(await client.point("hall.jpg", "door handle", model=checkpoint.model()))

Where the right answer is known, `TrainGroup.sft` teaches that instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import msgspec

from moondream_async._call.pages import each, entries, read_page
from moondream_async._checks import check_count
from moondream_async._protocol.requests import Request
from moondream_async._protocol.values import read_value
from moondream_async.errors import RequestError

from .records import (
    Checkpoint,
    CheckpointDownload,
    Finetune,
    MetricsLog,
    Rollouts,
    TrainStep,
)
from .wire import (
    LEARNING_RATE,
    TrainGroup,
    TuningRequest,
    create_request,
    metrics_request,
    read_finetune,
    read_rollouts,
    rollouts_request,
    train_step_request,
)

if TYPE_CHECKING:
    from moondream_async._call.call import Caller

TRAIN_TIMEOUT = 900.0
"""Seconds. A step takes up to minutes; the figure is the official SDK's."""


class Tuning:
    """Finetunes of an account: ``client.tuning``.

    A finetune is given as a `Finetune` or by its id. All methods raise
    APIConnectionError, APITimeoutError and APIStatusError as other calls do (see
    `errors`), and ClientClosedError where the client was closed before or meanwhile.
    Cancelling one drops its connection; what the server has begun it may finish.

    Calls are sent again as all others are, but for `train_step`. So where a deletion
    was answered but the answer was lost, it may end with `NotFoundError`.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         tuning = client.tuning
    ...         doors = await tuning.create("doors", rank=8)
    ...         truth = {"points": [{"x": 0.5, "y": 0.5}]}
    ...         request = md.TuningRequest.point(md.SAMPLE_IMAGE, "door", ground_truth=truth)
    ...         tried = await tuning.rollouts(doors, request, num_rollouts=2)
    ...         step = await tuning.train_step(doors, [md.TrainGroup.rl(tried)])
    ...         await tuning.log_metrics(doors, step.step, {"loss": 0.5})
    ...         async for asked, tried in tuning.rollout_stream(doors, [request]):
    ...             right = md.TrainGroup.sft(asked, truth)
    ...             await tuning.train_step(doors, [right])
    ...         saved = await tuning.save_checkpoint(doors)
    ...         print(saved.step, [each.step async for each in tuning.list_checkpoints(doors)])
    ...         print((await tuning.checkpoint_page(doors))["has_more"])
    ...         print((await tuning.checkpoint_url(doors, saved.step)).expires_in)
    ...         await tuning.delete_checkpoint(doors, saved.step)
    ...         print((await tuning.get(doors)).name, [each.name async for each in tuning.list()])
    ...         await tuning.delete(doors)
    >>> asyncio.run(main())
    2 [2]
    False
    3600.0
    doors ['doors']
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    # -- finetunes ----------------------------------------------------------------

    async def create(self, name: str, *, rank: int) -> Finetune:
        """Return the finetune of that name; it is made if there is none.

        Args:
            name: Letters, digits, dots, hyphens and underscores.
            rank: 8, 16, 24 or 32; see `Finetune.rank`.

        Raises:
            RequestError: An argument can't be right.
            APIStatusError: With status 409: there is one of another rank.
        """
        raw = await self._caller.call(create_request(name, rank)).json()
        return read_finetune(raw, name=name, rank=rank)

    async def get(self, finetune: Finetune | str) -> Finetune:
        """Return a finetune as it is now.

        Raises:
            NotFoundError: There is none.
        """
        return read_finetune(await self._get(_path(finetune)))

    async def list(
        self, *, limit: int = 50, cursor: str | None = None
    ) -> AsyncGenerator[Finetune, None]:
        """Iterate over the finetunes of the account, the oldest first.

        Args:
            limit: How many to ask for at a time, up to 100.
            cursor: Where to begin; a ``next_cursor`` of the server's.
        """
        path = "/tuning/finetunes"
        async for entry in entries(self._caller, path, "finetunes", limit=limit, cursor=cursor):
            yield read_finetune(entry)

    async def delete(self, finetune: Finetune | str) -> None:
        """Delete a finetune with its checkpoints.

        Raises:
            NotFoundError: There is none.
        """
        await self._delete(_path(finetune))

    # -- training -----------------------------------------------------------------

    async def rollouts(
        self, finetune: Finetune | str, request: TuningRequest, *, num_rollouts: int = 1
    ) -> Rollouts:
        """Let the model try a request, 1 to 16 times.

        Returns:
            The attempts; with `rewards` where the request has its ground truth.

        Raises:
            RequestError: An argument can't be right.
            ImageError: The picture can't be read, or is none.
        """
        tries = getattr(request, "num_rollouts", None) or num_rollouts
        made = rollouts_request(_id_of(finetune), request, tries)
        return read_rollouts(await self._caller.call(made).json())

    async def rollout_stream(
        self,
        finetune: Finetune | str,
        requests: Iterable[TuningRequest] | AsyncIterable[TuningRequest],
        *,
        num_rollouts: int = 1,
        max_concurrency: int = 4,
    ) -> AsyncGenerator[tuple[TuningRequest, Rollouts], None]:
        """Let the model try many requests, and yield each with its attempts as they are done.

        While the reader is busy, say with a `train_step`, those that were begun go on; new
        ones are begun when it comes back. Requests are taken from `requests` as they are
        needed, so it may go on for ever. Breaking off drops what was begun, at once where
        the iterator is closed (`contextlib.aclosing`).

        Args:
            finetune: The finetune.
            requests: The requests, from any iterable or asynchronous iterable.
            num_rollouts: Tries at each, 1 to 16.
            max_concurrency: Requests that are tried at once, or wait for the reader.

        Raises:
            RequestError: An argument can't be right.
            ImageError: A picture can't be read, or is none.
        """
        check_count("max_concurrency", max_concurrency)
        source = each(requests)
        tries: dict[asyncio.Task[Rollouts], TuningRequest] = {}
        feed: asyncio.Task[Any] | None = None
        more = True
        try:
            while True:
                if feed is None and more and len(tries) < max_concurrency:
                    feed = asyncio.create_task(_take(source))
                waiting = {*tries, *(() if feed is None else (feed,))}
                if not waiting:
                    return
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if feed is not None and feed in done:
                    taken, feed = feed.result(), None
                    more = bool(taken)
                    for request in taken:
                        trying = self.rollouts(finetune, request, num_rollouts=num_rollouts)
                        tries[asyncio.create_task(trying)] = request
                for task in [task for task in tries if task in done]:
                    result = task.result()
                    yield tries.pop(task), result
        finally:
            with anyio.CancelScope(shield=True):
                left = [*tries, *(() if feed is None else (feed,))]
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
                await source.aclose()

    async def train_step(
        self,
        finetune: Finetune | str,
        groups: Iterable[TrainGroup | Mapping[str, Any]],
        *,
        lr: float = LEARNING_RATE,
        timeout: float | None = None,
        **fields: Any,
    ) -> TrainStep:
        """Let the model learn, one step.

        A step that is sent twice may be made twice, and nothing in the protocol prevents
        it: there is no key to tell a repetition by. (The official SDK takes that risk: it
        sends a step again up to ten times, also after a timeout.) So a step is sent again
        only where the server can't have begun with it: no connection was made, or it
        turned the step away with status 425 or 429. After any other error it is unknown
        whether the step was made; the next one's `TrainStep.step` tells, by its count.

        Args:
            finetune: The finetune.
            groups: What to learn from; or mappings in the server's own format, in whose
                request a picture may stand under ``image``.
            lr: The learning rate.
            timeout: Seconds to wait for the answer. Else it is the client's
                `Timeout.first_event`, or 900 where that is shorter; its `total` holds here
                too.
            fields: What else to send, for servers that know more.

        Raises:
            RequestError: An argument can't be right.
            ImageError: A picture can't be read, or is none.
        """
        request = train_step_request(_id_of(finetune), groups, lr, fields)
        limits = self._caller.timeout
        if timeout is not None:
            limits = msgspec.structs.replace(limits, first_event=timeout)
        elif limits.first_event is not None:
            longest = max(limits.first_event, TRAIN_TIMEOUT)
            limits = msgspec.structs.replace(limits, first_event=longest)
        raw = await self._caller.call(request, timeout=limits).json()
        return read_value(TrainStep, raw, raw=raw)

    async def log_metrics(
        self, finetune: Finetune | str, step: int, metrics: Mapping[str, float]
    ) -> MetricsLog:
        """Keep numbers of yours with a step, for the dashboard.

        Raises:
            RequestError: One of them is no finite number.
        """
        request = metrics_request(f"{_path(finetune)}/metrics", step, metrics)
        raw = await self._caller.call(request).record()
        return read_value(MetricsLog, raw, raw=raw)

    # -- checkpoints --------------------------------------------------------------

    async def list_checkpoints(
        self, finetune: Finetune | str, *, limit: int = 50, cursor: str | None = None
    ) -> AsyncGenerator[Checkpoint, None]:
        """Iterate over the saved checkpoints of a finetune, in the order of their steps.

        Args:
            finetune: The finetune.
            limit: How many to ask for at a time, up to 100.
            cursor: Where to begin; a ``next_cursor`` of the server's.
        """
        path = f"{_path(finetune)}/checkpoints"
        async for entry in entries(self._caller, path, "checkpoints", limit=limit, cursor=cursor):
            yield _read_checkpoint(entry, finetune)

    async def checkpoint_page(
        self, finetune: Finetune | str, *, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return a page of the checkpoints: `checkpoints`, `next_cursor` and `has_more`.

        Raises:
            RequestError: `limit` is not between 1 and 100.
        """
        path = f"{_path(finetune)}/checkpoints"
        page = await read_page(self._caller, path, limit=limit, cursor=cursor)
        found = page.get("checkpoints")
        saved = [_read_checkpoint(entry, finetune) for entry in found or ()]
        return {**page, "checkpoints": saved}

    async def save_checkpoint(self, finetune: Finetune | str) -> Checkpoint:
        """Save the finetune as it is after its last step; again, it is the same checkpoint.

        Raises:
            NotFoundError: There is no such finetune, or it was never trained.
        """
        request = Request(None, f"{_path(finetune)}/checkpoints/save")
        raw = await self._caller.call(request).json()
        return _read_checkpoint(raw.get("checkpoint", raw), finetune)

    async def delete_checkpoint(self, finetune: Finetune | str, step: int) -> None:
        """Delete a checkpoint. Without its latest one a finetune can't be trained further.

        Raises:
            NotFoundError: There is none.
            APIStatusError: With status 410, on some servers: it was deleted before.
        """
        await self._delete(_checkpoint_path(finetune, step))

    async def checkpoint_url(self, finetune: Finetune | str, step: int) -> CheckpointDownload:
        """Return an address to fetch a checkpoint from, for an hour or so.

        Raises:
            NotFoundError: There is none.
            APIStatusError: With status 410: it has expired or was deleted.
        """
        raw = await self._get(f"{_checkpoint_path(finetune, step)}/download")
        return read_value(CheckpointDownload, raw, raw=raw)

    async def _get(self, path: str) -> dict[str, Any]:
        return await self._caller.call(Request(None, path, method="GET")).json()

    async def _delete(self, path: str) -> None:
        await self._caller.call(Request(None, path, method="DELETE")).record()


async def _take(source: AsyncGenerator[TuningRequest, None]) -> tuple[TuningRequest, ...]:
    """Take the next request, if there is one."""
    async for request in source:
        return (request,)
    return ()


def _read_checkpoint(raw: Any, finetune: Finetune | str) -> Checkpoint:
    known = raw if isinstance(raw, Mapping) else {}
    return read_value(Checkpoint, {"finetune_id": _id_of(finetune), **known}, raw=raw)


def _path(finetune: Finetune | str) -> str:
    return f"/tuning/finetunes/{quote(_id_of(finetune), safe='')}"


def _checkpoint_path(finetune: Finetune | str, step: int) -> str:
    check_count("step", step, least=0)
    return f"{_path(finetune)}/checkpoints/{step}"


def _id_of(finetune: Finetune | str) -> str:
    identity = finetune.finetune_id if isinstance(finetune, Finetune) else finetune
    if not isinstance(identity, str) or not identity:
        raise RequestError(f"finetune must be a Finetune or an id, not {finetune!r:.100}")
    return identity
