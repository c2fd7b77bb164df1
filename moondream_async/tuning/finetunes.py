"""Finetunes: train the cloud's model on your own tasks.

A step of reinforcement learning: the model answers several times, each answer gets a
reward, and the model learns which answers are better::

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

`TrainGroup.sft` teaches a right answer instead.
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

from .records import Checkpoint, CheckpointDownload, Finetune, MetricsLog, Rollouts, TrainStep
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
"""Seconds: a step can take minutes, and the official SDK waits as long."""


class Tuning:
    """Finetunes of an account: ``client.tuning``.

    A finetune is passed as a `Finetune` or by its id. All methods raise
    APIConnectionError, APITimeoutError and APIStatusError as other calls do (see
    `errors`), and ClientClosedError if the client is closed before the call or during
    it. Cancelling a method drops its connection; the server may finish the work.

    All calls but `train_step` are retried. So a deletion may raise `NotFoundError`
    although it succeeded: the first answer was lost, and the retry found nothing.

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
        """Return the finetune with this name; create it if there is none.

        Args:
            name: Letters, digits, dots, hyphens and underscores.
            rank: 8, 16, 24 or 32; see `Finetune.rank`.

        Raises:
            RequestError: An argument is invalid.
            APIStatusError: With status 409: the finetune has another rank.
        """
        raw = await self._caller.call(create_request(name, rank)).json()
        return read_finetune(raw, name=name, rank=rank)

    async def get(self, finetune: Finetune | str) -> Finetune:
        """Return the present state of a finetune.

        Raises:
            NotFoundError: There is no such finetune.
        """
        return read_finetune(await self._get(_path(finetune)))

    async def list(
        self, *, limit: int = 50, cursor: str | None = None
    ) -> AsyncGenerator[Finetune, None]:
        """Iterate over the finetunes of the account, the oldest first.

        Args:
            limit: The number of finetunes in one request to the server, up to 100.
            cursor: A ``next_cursor`` of the server, to begin at its page.
        """
        path = "/tuning/finetunes"
        async for entry in entries(self._caller, path, "finetunes", limit=limit, cursor=cursor):
            yield read_finetune(entry)

    async def delete(self, finetune: Finetune | str) -> None:
        """Delete a finetune with its checkpoints.

        Raises:
            NotFoundError: There is no such finetune.
        """
        await self._delete(_path(finetune))

    # -- training -----------------------------------------------------------------

    async def rollouts(
        self, finetune: Finetune | str, request: TuningRequest, *, num_rollouts: int = 1
    ) -> Rollouts:
        """Let the model answer a request 1 to 16 times.

        Returns:
            The answers, with `rewards` if the request has a ground truth.

        Raises:
            RequestError: An argument is invalid.
            ImageError: The picture can't be read.
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
        """Let the model answer many requests; yield each request with its answers when done.

        While the reader is busy, for example with a `train_step`, requests under way
        continue, and no new ones begin. `requests` may be endless: the method takes the
        next one when it can begin. Closing the iterator (`contextlib.aclosing`) cancels
        the requests under way at once.

        Args:
            finetune: The finetune.
            requests: The requests, from any iterable or asynchronous iterable.
            num_rollouts: Answers to each request, 1 to 16.
            max_concurrency: The most requests under way or waiting for the reader.

        Raises:
            RequestError: An argument is invalid.
            ImageError: A picture can't be read.
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
        """Train the model by one step.

        The protocol has no key by which a server could recognize a retry: a step that is
        sent twice may be done twice. (The official SDK takes this risk, up to ten times.)
        So a step is retried only if the server can't have begun it: the connection
        failed, or the server refused the step with status 425 or 429. After any other
        error the count in the next `TrainStep.step` shows whether the step was done.

        Args:
            finetune: The finetune.
            groups: The examples to learn from; or mappings in the server's format, whose
                request may hold its picture as ``image``.
            lr: The learning rate.
            timeout: Seconds to wait for the answer. None is the client's
                `Timeout.first_event`, but at least 900. `Timeout.total` limits both.
            fields: Further fields to send.

        Raises:
            RequestError: An argument is invalid.
            ImageError: A picture can't be read.
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
        """Log your own metrics of a step, for the dashboard.

        Raises:
            RequestError: A value is not a finite number.
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
            limit: The number of checkpoints in one request to the server, up to 100.
            cursor: A ``next_cursor`` of the server, to begin at its page.
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
        """Save the state after the last step. Saved twice, a step is one checkpoint.

        Raises:
            NotFoundError: There is no such finetune, or it was never trained.
        """
        request = Request(None, f"{_path(finetune)}/checkpoints/save")
        raw = await self._caller.call(request).json()
        return _read_checkpoint(raw.get("checkpoint", raw), finetune)

    async def delete_checkpoint(self, finetune: Finetune | str, step: int) -> None:
        """Delete a checkpoint. Without its latest checkpoint a finetune can't be trained further.

        Raises:
            NotFoundError: There is no such checkpoint.
            APIStatusError: With status 410, on some servers: it was deleted before.
        """
        await self._delete(_checkpoint_path(finetune, step))

    async def checkpoint_url(self, finetune: Finetune | str, step: int) -> CheckpointDownload:
        """Return an address from which a checkpoint can be downloaded for about an hour.

        Raises:
            NotFoundError: There is no such checkpoint.
            APIStatusError: With status 410: the checkpoint has expired or was deleted.
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
    quoted = quote(_id_of(finetune), safe="", errors="surrogatepass")
    return f"/tuning/finetunes/{quoted}"


def _checkpoint_path(finetune: Finetune | str, step: int) -> str:
    check_count("step", step, least=0)
    return f"{_path(finetune)}/checkpoints/{step}"


def _id_of(finetune: Finetune | str) -> str:
    identity = finetune.finetune_id if isinstance(finetune, Finetune) else finetune
    if not isinstance(identity, str) or not identity:
        raise RequestError(f"finetune must be a Finetune or an id, not {finetune!r:.100}")
    return identity
