"""The server's own Batch API: a file of requests goes up, files of results come down.

For what can wait: the price is half of that of calls (docs.moondream.ai/batch)::

    async with md.MoondreamClient() as client:
        batch = await client.batches.create(
            md.BatchRequest.caption(path, id=path.name) for path in Path("photos").glob("*.jpg")
        )
        batch = await client.batches.wait(batch)
        async for line in client.batches.results(batch):
            print(line.id, line.result.caption if line.ok else line.error.message)

A batch is one file. It is written to the disk as it is built, checked to its last
line, and sent from there in parts, so that its size costs no memory and a part
that fails is sent again by itself. What breaks off leaves nothing on the server:
the upload is aborted.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from urllib.parse import quote

import anyio

from moondream_async._call.pages import entries
from moondream_async._call.retry import is_worth_retrying
from moondream_async._checks import check_count, check_positive
from moondream_async._protocol.requests import Request
from moondream_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    MoondreamError,
    RequestError,
    ServerError,
)
from moondream_async.results import BASE_MODEL

from .records import Batch, BatchFailure, BatchResult
from .uploads import Progress, Requests, Upload, open_checked, spooled
from .wire import MAX_RESULT_BYTES, LineSplitter, read_batch, read_batch_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from moondream_async._call.call import Call, Caller
    from moondream_async._transport.bodies import Body

PART_BYTES = 50_000_000  # what the documentation advises
MAX_PART_BYTES = 99_999_999  # the documented limit is 100 MB
MAX_PARTS = 10_000  # S3's limit, and in all else the server's uploads are like S3's

_FAILED_POLLS = 5  # one after the other, before `wait` gives up


class Batches:
    """Batches of a client: ``client.batches``.

    All methods raise APIConnectionError, APITimeoutError and APIStatusError as other
    calls do (see `errors`), and ClientClosedError where the client was closed before
    or meanwhile.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         requests = [md.BatchRequest.caption(md.SAMPLE_IMAGE, id=1)]
    ...         batch = await client.batches.create(requests)
    ...         print((await client.batches.get(batch)).model)
    ...         await client.batches.wait(batch, interval=0.01)
    ...         print([each.id == batch.id async for each in client.batches.list()])
    ...         async for each in client.batches.results(batch):
    ...             print(each.id, each.result.caption if each.ok else each.error)
    >>> asyncio.run(main())
    moondream3-preview
    [True]
    1 A bright 640...
    """

    def __init__(self, caller: Caller, model: str | None = None) -> None:
        self._caller = caller
        self._model = model

    async def create(
        self,
        requests: Requests | str | os.PathLike[str],
        *,
        model: str | None = None,
        part_bytes: int = PART_BYTES,
        on_progress: Progress | None = None,
    ) -> Batch:
        """Upload a batch; return once the server has it and begins.

        The file is built in the directory for temporary files (see `tempfile`), which
        must have room for it, and gone afterwards; pictures are prepared as for other
        calls, and made smaller where a line would pass its limit. Nothing is sent
        before the last request is checked.

        Cancelling it, like any failure, aborts the upload, which may take a moment. Only
        at its ends is there nothing to abort: while the server is first asked for an
        upload, which then may stay there empty, and when it has all and begins.

        Args:
            requests: The requests, from any iterable or asynchronous iterable; or the
                path of a JSONL file in the server's format, sent as it is.
            model: A model other than the client's, for all lines, as a finetune's (see
                `Finetune.model`). Where neither is named it is ``moondream3-preview``: by
                the documentation's latest word batches must name one.
            part_bytes: How much goes up in one part.
            on_progress: Called with the bytes that the server has and those of the whole
                file, after each part. What it raises ends the upload.

        Raises:
            RequestError: The server would refuse the file: over 2 GB, 100,000 lines or
                10 MB a line; a blank line, one that is no JSON, a query without a
                picture, or an id that is there twice. The message names the line,
                counted from 1.
            ImageError: A picture can't be read, or is none; the message names the line.
        """
        check_count("part_bytes", part_bytes)
        if part_bytes > MAX_PART_BYTES:
            raise RequestError(f"part_bytes must be under 100 MB, not {part_bytes:,} bytes")
        self._caller.check_open()
        if isinstance(requests, (str, os.PathLike)):
            opened = open_checked(requests)
        else:
            opened = spooled(self._caller, requests)
        async with opened as file:
            parts = file.slices(part_bytes)
            if len(parts) > MAX_PARTS:
                raise RequestError(f"part_bytes={part_bytes} makes more than {MAX_PARTS:,} parts")
            async with Upload.begin(self._caller) as upload:
                await upload.send(parts, on_progress)
                return await self._complete(upload, model or self._model or BASE_MODEL)

    async def get(self, batch: Batch | str) -> Batch:
        """Return a batch as it is now. One that failed is returned like any other."""
        request = Request(None, f"/batch/{_quoted_id(batch)}", method="GET")
        return read_batch(await self._caller.call(request).record())

    async def list(
        self, *, limit: int = 50, cursor: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Iterate over the batches of the account.

        Args:
            limit: How many to ask for at a time, up to 100.
            cursor: Where to begin; a ``next_cursor`` of the server's.
        """
        async for entry in entries(self._caller, "/batch", "batches", limit=limit, cursor=cursor):
            yield read_batch(entry)

    async def wait(
        self,
        batch: Batch | str,
        *,
        timeout: float | None = None,
        interval: float = 1.0,
        max_interval: float = 30.0,
        on_poll: Callable[[Batch], object] | None = None,
    ) -> Batch:
        """Return a batch when it has ended, well or not: see its `status` and `error`.

        The server is asked again and again, less often as time goes by. A few times
        in a row it may fail to answer. Cancelling it leaves the batch alone.

        Args:
            batch: The batch, or its id.
            timeout: Seconds to wait at most; None is for ever.
            interval: Seconds before the server is asked a second time.
            max_interval: Seconds between two times at most; between these two it grows.
            on_poll: Called with each answer, the last included.

        Raises:
            RequestError: A time is not a number over 0, or `on_poll` is no function.
            APITimeoutError: It has not ended; the server goes on with it.
        """
        check_positive("interval", interval, "a number of seconds over 0")
        check_positive("max_interval", max_interval, "a number of seconds over 0")
        if timeout is not None:
            check_positive("timeout", timeout, "a number of seconds over 0, or None")
        if on_poll is not None and not callable(on_poll):
            raise RequestError(f"on_poll must be a function, not {on_poll!r}")
        failures = 0
        with anyio.move_on_after(timeout):
            while True:
                try:
                    state = await self.get(batch)
                except MoondreamError as error:
                    failures += 1
                    if failures > _FAILED_POLLS or not is_worth_retrying(error):
                        raise
                else:
                    failures = 0
                    if on_poll is not None:
                        on_poll(state)
                    if state.done:
                        return state
                # A little at random, so that those who began together do not go on so.
                await anyio.sleep(interval * random.uniform(0.75, 1.0))  # noqa: S311 - no secret
                interval = min(interval * 1.5, max_interval)
        raise APITimeoutError(
            f"The batch {_id_of(batch)} has not ended within {timeout:g} seconds", phase="total"
        )

    async def results(self, batch: Batch | str) -> AsyncGenerator[BatchResult, None]:
        """Iterate over the results of a batch that has completed, as they are downloaded.

        They come in no order: the `id` and the `line_index` of each say which request it
        answers. Each comes once, also where a download breaks off and is begun again.
        Lines that failed are among them, with their `error`, and so are those that are no
        result at all (their code is ``invalid_line``). Nothing is downloaded
        ahead of the reader, and no more than a line is kept.

        The addresses of the files hold for a time only; where they have expired, the
        server is asked for new ones. The key is not sent there.

        Raises:
            RequestError: The batch has not ended yet.
            APIStatusError: The batch failed; `code` says why.
        """
        state = batch if isinstance(batch, Batch) and batch.outputs else await self.get(batch)
        _check_completed(state)
        seen: set[object] = set()
        for place in range(len(state.outputs)):
            async with contextlib.aclosing(self._output(state, place)) as results:
                async for number, result in results:
                    key = (place, number) if result.line_index is None else result.line_index
                    if key not in seen:
                        seen.add(key)
                        yield result

    async def _complete(self, upload: Upload, model: str) -> Batch:
        try:
            return read_batch(await upload.complete(model))
        except (APIConnectionError, APITimeoutError, APIStatusError):
            # An answer that was lost may have been a yes. Then there is no such upload any
            # more, but a batch, under the id of its file.
            with contextlib.suppress(MoondreamError):
                return await self.get(upload.file_id)
            raise

    async def _output(
        self, batch: Batch, place: int
    ) -> AsyncGenerator[tuple[int, BatchResult], None]:
        """Yield the results of one file, numbered; ask for its address where that has expired."""
        renewed = False
        while True:
            call = self._call_for(batch, place)
            try:
                async with contextlib.aclosing(self._download(call)) as results:
                    async for numbered in results:
                        yield numbered
            except APIStatusError as error:
                if renewed or not 400 <= error.status < 500:
                    raise
                renewed = True
                batch = await self.get(batch)
            else:
                return

    async def _download(self, call: Call) -> AsyncGenerator[tuple[int, BatchResult], None]:
        """Yield the results of one file, numbered; again from the first where it broke off."""
        failure: MoondreamError | None = None
        try:
            while True:
                body = await call.download(after=failure)
                try:
                    async with contextlib.aclosing(self._read(body)) as results:
                        async for numbered in results:
                            yield numbered
                except APIConnectionError as error:
                    failure = error
                else:
                    break
        except BaseException as error:
            call.report.ended(error=None if isinstance(error, GeneratorExit) else error)
            raise
        call.report.ended(completed=True)

    def _call_for(self, batch: Batch, place: int) -> Call:
        url = batch.outputs[place].url if place < len(batch.outputs) else ""
        if re.fullmatch(r"https?://[!-~]+", url) is None:
            raise ServerError(
                f"The server gives no valid address for the results of {batch.id}", status=200
            )
        return self._caller.call(Request(None, url, method="GET", elsewhere=True))

    async def _read(self, body: Body) -> AsyncGenerator[tuple[int, BatchResult], None]:
        """Yield the results in the body of a download, numbered; close it."""
        splitter = LineSplitter(MAX_RESULT_BYTES)
        number = 0
        try:
            while (data := await self._next(body)) is not None:
                for line in splitter.feed(data):
                    if line.strip():
                        yield number, _read_line(line)
                        number += 1
        except OverflowError:
            raise APIConnectionError(
                f"A line of results is over the limit of {MAX_RESULT_BYTES} bytes", permanent=True
            ) from None
        finally:
            body.close()
        rest = splitter.rest()
        if rest.strip():
            yield number, _read_last(rest)

    async def _next(self, body: Body) -> bytes | None:
        """Return the next bytes, or None at the end; wait no longer than between two events."""
        idle = self._caller.timeout.idle
        with anyio.move_on_after(idle):
            return await anext(body, None)
        raise APITimeoutError(
            f"Nothing of the results came within {idle:g} seconds (Timeout.idle)", phase="idle"
        )


def _read_line(line: bytes) -> BatchResult:
    """Read a line of results; what is none is a failure of that line, and of no other."""
    try:
        return read_batch_result(line)
    except (ServerError, RecursionError) as error:
        message = f"The server's line is no result: {error}"
        failure = BatchFailure(code="invalid_line", message=message)
        return BatchResult(raw={}, error=failure)


def _read_last(line: bytes) -> BatchResult:
    try:
        return read_batch_result(line)
    except ServerError as error:
        raise APIConnectionError("The connection was lost within a line of results") from error


def _check_completed(batch: Batch) -> None:
    if batch.error is not None or batch.status == "failed":
        failure = batch.error
        raise APIStatusError(
            f"The batch {batch.id} failed: {failure.message if failure else 'no reason given'}",
            status=200,
            code=failure.code if failure else None,
            body=batch.raw,
        )
    if not batch.done and not batch.outputs:
        raise RequestError(f"The batch {batch.id} is {batch.status}: wait() for it first")
    if not batch.outputs:
        raise ServerError(
            f"The server names no results of the batch {batch.id}", status=200, body=batch.raw
        )


def _id_of(batch: Batch | str) -> str:
    identity = batch.id if isinstance(batch, Batch) else batch
    if not isinstance(identity, str) or not identity:
        raise RequestError(f"batch must be a Batch or an id, not {batch!r:.100}")
    return identity


def _quoted_id(batch: Batch | str) -> str:
    return quote(_id_of(batch), safe="")
