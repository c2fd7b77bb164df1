"""``bulk --via batch-api``: pictures go to the server in batches, and results are fetched later.

The batches are recorded in a file beside the journal. When a run is ended while it waits,
the next run fetches their results, and nothing is paid for twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from moondream_async.batch.wire import BatchRequest
from moondream_async.cli._files import replacing
from moondream_async.cli._output import note
from moondream_async.errors import APIStatusError, ImageError, RequestError

from .lines import encode
from .questions import Pending
from .sources import Contents, Found, name_of, path_of

if TYPE_CHECKING:
    from moondream_async import Batch, BatchResult, EncodedImage

    from .job import Job

MOST_PICTURES = 20_000  # a batch; the server takes 100,000, and 2 GB
MOST_BYTES = 1_000_000_000  # of pictures, before base64

_Readable = tuple[Pending, "EncodedImage"]


class _Named(msgspec.Struct):
    path: str
    below: str
    asked: dict[str, Any] | None = None
    row: dict[str, Any] | None = None


class Sent(msgspec.Struct):
    """A batch on the server, and its pictures; the id of a request is the index of its picture."""

    batch: str
    pictures: list[tuple[_Named, Contents | None]]


async def ask_by_batch(job: Job) -> None:
    """Fetch the batches of earlier runs, send the other pictures, and fetch those batches.

    Raises:
        RequestError: Batches take no settings for this skill.
    """
    if job.questions.skill in ("detect", "point") and "settings" in job.questions.arguments:
        raise RequestError(f"{job.questions.skill} takes no settings with '--via batch-api'")
    record = Path(f"{job.journal.path}.batches")
    waiting = _recorded(record)
    await _fetch_all(job, record, waiting)
    async with contextlib.aclosing(_readable(job)) as readable:
        async for first in readable:
            pictures: list[tuple[_Named, Contents | None]] = []
            batch = await job.client.batches.create(_requests(job, first, readable, pictures))
            waiting.append(Sent(batch.id, pictures))
            _record(record, waiting)
            count = f"{len(pictures):,} pictures"
            note(f"Batch {batch.id} has {count}. Ctrl-C leaves it; run again then.")
    await _fetch_all(job, record, waiting)


async def _readable(job: Job) -> AsyncGenerator[_Readable, None]:
    """Yield the pictures that can be sent; an unreadable one gets its error line."""
    async with contextlib.aclosing(job.items()) as items:
        async for pending in items:
            try:
                image = await job.client.encode_image(cast("Any", pending))
            except ImageError as error:
                job.keep(pending, error)
            else:
                yield pending, image


async def _requests(
    job: Job,
    first: _Readable,
    others: AsyncIterator[_Readable],
    pictures: list[tuple[_Named, Contents | None]],
) -> AsyncGenerator[BatchRequest, None]:
    """Yield the requests of one batch, and add their pictures to `pictures`."""
    make: Any = getattr(BatchRequest, job.questions.skill)
    size = 0
    readable: _Readable | None = first
    while readable is not None:
        pending, image = readable
        found, asked = pending.found, dict(pending.asked)
        arguments = {name: asked[name] for name in job.questions.arguments}
        yield make(image, id=len(pictures), **arguments)
        named = _Named(found.name, name_of(found.below), asked, found.row)
        pictures.append((named, pending.contents))
        size += len(image.data)
        if len(pictures) == MOST_PICTURES or size >= MOST_BYTES:
            return
        readable = await anext(others, None)


async def _fetch_all(job: Job, record: Path, waiting: list[Sent]) -> None:
    while waiting:
        await _fetch(job, waiting[0])
        del waiting[0]
        _record(record, waiting)


async def _fetch(job: Job, sent: Sent) -> None:
    """Write what became of a batch's pictures; a MoondreamError is for a later run to try again.

    Where the whole batch failed, or is gone, each of its pictures gets this failure.
    """

    def show(batch: Batch) -> None:
        progress = batch.progress
        note(f"Batch {batch.id}: {batch.status}, {progress.completed:,} of {progress.total:,}")

    # A run that was ended here has already written some of the results.
    left: dict[int | None, Pending] = {}
    for place, (named, contents) in enumerate(sent.pictures):
        found = Found(path_of(named.path), path_of(named.below), named.row)
        # The record of an older version does not say what was asked.
        pending = Pending(found, named.asked or job.questions.general)
        pending.contents, pending.tries = contents, 1
        if not job.journal.has(found, pending.asked):
            left[place] = pending
    failure = "the batch has no result for it"
    try:
        batch = await job.client.batches.wait(sent.batch, on_poll=show)
        async for line in job.client.batches.results(batch):
            if (answered := left.pop(_place(line), None)) is not None:
                job.keep(answered, _outcome(line), usage=line.usage)
    except APIStatusError as error:
        if not _is_lasting(error):
            raise
        failure = str(error)
        note(f"Batch {sent.batch} came to nothing: {failure}")
    for pending in left.values():
        job.keep(pending, _failure(failure))
        job.not_again.add(pending.found.name)  # the next run asks about it again


def _place(line: BatchResult) -> int | None:
    """Return the index of the request that a line answers: its id, else the line's index."""
    try:
        return msgspec.convert(line.id, int, strict=False)
    except msgspec.ValidationError:
        return line.line_index


def _is_lasting(error: APIStatusError) -> bool:
    """Tell whether a later try would fail, too: the batch failed, or is gone."""
    return error.status < 500 and error.status not in (401, 402, 408, 425, 429)


def _outcome(line: BatchResult) -> Any:
    if line.result is not None:
        return line.result
    failure = line.error
    return _failure(failure.message if failure else "", failure.code if failure else None)


def _failure(message: str, code: str | None = None) -> dict[str, Any]:
    return {"error": {"type": "BatchFailure", "message": message, "code": code}}


def _recorded(record: Path) -> list[Sent]:
    """Return the batches of earlier runs; RequestError where the record is damaged."""
    try:
        return msgspec.json.decode(record.read_bytes(), type=list[Sent])
    except FileNotFoundError:
        return []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(
            f"{record} is damaged, so the batches in it can't be fetched: remove it to ask "
            f"about their pictures again ({error})"
        ) from error


def _record(record: Path, waiting: list[Sent]) -> None:
    if waiting:
        with replacing(record) as file:
            file.write(encode(waiting))
    elif record.exists():
        record.unlink()
