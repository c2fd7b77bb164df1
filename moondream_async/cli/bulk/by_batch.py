"""``bulk --via batch-api``: the job is handed to the server, and its results are fetched.

What was handed over is written down beside the journal, so that a run that was
ended while it waited is not paid for twice: the next one fetches it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from moondream_async.batch.wire import BatchRequest
from moondream_async.cli._output import note
from moondream_async.errors import ImageError, RequestError

from .journal import replacing
from .sources import Contents, Found, PictureFile

if TYPE_CHECKING:
    from moondream_async import Batch, BatchResult, EncodedImage

    from .job import Job

MOST_PICTURES = 20_000  # a batch; the server takes 100,000, and 2 GB
MOST_BYTES = 1_000_000_000  # of pictures, before base64

_Good = tuple[PictureFile, "EncodedImage"]


class Sent(msgspec.Struct):
    """A batch that the server has, and the pictures in it: the place of each is its id."""

    batch: str
    pictures: list[tuple[Found, Contents | None]]


async def ask_by_batch(job: Job) -> None:
    """Fetch what earlier runs handed over, hand over the rest, and fetch that.

    Raises:
        RequestError: Batches can't be asked that.
    """
    if job.skill in ("detect", "point") and "settings" in job.arguments:
        raise RequestError(f"{job.skill} takes no settings with '--via batch-api'")
    record = Path(f"{job.journal.path}.batches")
    waiting = _recorded(record)
    job.journal.remember = True
    for sent in list(waiting):
        await _fetch(job, sent)
        waiting.remove(sent)
        _keep(record, waiting)
    items = job.items()
    first = await _next_good(job, items)
    while first is not None:
        pictures: list[tuple[Found, Contents | None]] = []
        batch = await job.client.batches.create(_requests(job, first, items, pictures))
        waiting.append(Sent(batch.id, pictures))
        _keep(record, waiting)
        note(f"Batch {batch.id} has {len(pictures):,} pictures. Ctrl-C leaves it; run again then.")
        first = await _next_good(job, items)
    for sent in list(waiting):
        await _fetch(job, sent)
        waiting.remove(sent)
        _keep(record, waiting)


async def _requests(
    job: Job,
    first: _Good,
    items: AsyncIterator[PictureFile],
    pictures: list[tuple[Found, Contents | None]],
) -> AsyncGenerator[BatchRequest, None]:
    """Yield requests until a batch is full, and note their pictures."""
    make: Any = getattr(BatchRequest, job.skill)
    size = 0
    good: _Good | None = first
    while good is not None:
        file, image = good
        yield make(image, id=len(pictures), **job.arguments)
        pictures.append((file.found, file.contents))
        size += len(image.data)
        if len(pictures) == MOST_PICTURES or size >= MOST_BYTES:
            return
        good = await _next_good(job, items)


async def _next_good(job: Job, items: AsyncIterator[PictureFile]) -> _Good | None:
    """Return the next picture that can be sent; the others are written down as failed."""
    async for file in items:
        try:
            return file, await job.client.encode_image(cast("Any", file))
        except ImageError as error:
            job.keep(file.found, file.contents, error)
    return None


async def _fetch(job: Job, sent: Sent) -> None:
    def show(batch: Batch) -> None:
        progress = batch.progress
        note(f"Batch {batch.id}: {batch.status}, {progress.completed:,} of {progress.total:,}")

    batch = await job.client.batches.wait(sent.batch, on_poll=show)
    left = dict(enumerate(sent.pictures))
    async for line in job.client.batches.results(batch):
        # After a run that was ended in the middle of this, some are there already.
        if line.id in left:
            found, contents = left.pop(line.id)
            if not job.journal.has(found):
                job.keep(found, contents, _outcome(line), tries=1)
    for found, contents in left.values():
        missing = {"type": "BatchFailure", "message": "the batch has no result for it"}
        job.keep(found, contents, {"error": missing}, tries=1)


def _outcome(line: BatchResult) -> Any:
    if line.result is None:
        failure = line.error
        code = failure.code if failure else None
        message = failure.message if failure else ""
        return {"error": {"type": "BatchFailure", "message": message, "code": code}}
    if line.result.metrics is None and line.usage is not None:
        line.result["metrics"] = line.usage
    return line.result


def _recorded(record: Path) -> list[Sent]:
    return msgspec.json.decode(record.read_bytes(), type=list[Sent]) if record.exists() else []


def _keep(record: Path, waiting: list[Sent]) -> None:
    if waiting:
        with replacing(record) as file:
            file.write(msgspec.json.encode(waiting))
    elif record.exists():
        record.unlink()
