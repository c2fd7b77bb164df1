"""The server's own Batch API: a file of requests goes up, files of results come down.

A batch takes longer than calls and costs half as much (docs.moondream.ai/batch)::

    async with md.MoondreamClient() as client:
        batch = await client.batches.create(
            md.BatchRequest.caption(path, id=path.name) for path in Path("photos").glob("*.jpg")
        )
        batch = await client.batches.wait(batch)
        async for line in client.batches.results(batch):
            print(line.id, line.result.caption if line.ok else line.error.message)

A batch is one file. The client writes the file to the disk, checks every line, and
uploads the file in parts: its size costs no memory, and only a part that fails is sent
again. An upload that does not succeed is aborted, and leaves nothing on the server.
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
from .wire import MAX_RESULT_BYTES, read_batch, read_batch_result

if TYPE_CHECKING:
    from collections.abc import Callable

    from moondream_async._call.call import Call, Caller
    from moondream_async._transport.bodies import Body

PART_BYTES = 50_000_000  # the documentation's advice
MAX_PART_BYTES = 99_999_999  # the documented limit is 100 MB
MAX_PARTS = 10_000  # S3's limit; the server's uploads are like those of S3 in all else

_FAILED_POLLS = 5  # in a row, after which `wait` gives up


class Batches:
    """Batches of a client: ``client.batches``.

    All methods raise APIConnectionError, APITimeoutError and APIStatusError as other
    calls do (see `errors`), and ClientClosedError if the client is closed before the
    call or during it.

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
        """Upload a batch; return when the server has the whole file and begins its work.

        The file is built in the directory for temporary files (see `tempfile`), which
        must have room for it, and deleted afterwards. Pictures are prepared as for other
        calls, and made smaller where a line would pass its limit. The upload begins
        after the last request is checked.

        Cancelling, like any failure, aborts the upload, which may take a moment. Two
        moments are exceptions: cancelled while it asks the server for an upload, it may
        leave an empty upload there; cancelled while the server accepts the whole file,
        it may leave a batch.

        Args:
            requests: The requests, from any iterable or asynchronous iterable; or the
                path of a JSONL file in the server's format, sent as it is.
            model: A model for all lines, for example a finetune's (see `Finetune.model`).
                None is the client's model, or ``moondream3-preview`` if the client has
                none: the documentation wants every batch to name its model.
            part_bytes: The size of the parts of the upload.
            on_progress: Called after each part with two numbers of bytes: the server's
                so far, and the whole file's. An exception in it ends the upload.

        Raises:
            RequestError: The server would refuse the file: over 2 GB, 100,000 lines or
                10 MB a line; a blank line, a line that is not JSON, a query without a
                picture, or the same id twice. The message names the line, counted from 1.
            ImageError: A picture can't be read; the message names the line.
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
            if file.size > MAX_PARTS * part_bytes:
                raise RequestError(f"part_bytes={part_bytes} makes more than {MAX_PARTS:,} parts")
            async with Upload.begin(self._caller) as upload:
                await upload.send(file.slices(part_bytes), on_progress)
                return await self._complete(upload, model or self._model or BASE_MODEL)

    async def get(self, batch: Batch | str) -> Batch:
        """Return the present state of a batch, also of one that failed."""
        request = Request(None, f"/batch/{_quoted_id(batch)}", method="GET")
        return read_batch(await self._caller.call(request).record())

    async def list(
        self, *, limit: int = 50, cursor: str | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Iterate over the batches of the account.

        Args:
            limit: The number of batches in one request to the server, up to 100.
            cursor: A ``next_cursor`` of the server, to begin at its page.
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
        """Return a batch when it has completed or failed: see its `status` and `error`.

        The client polls the server, less often as time goes by. Up to five polls in a row
        may fail. Cancelling does nothing to the batch.

        Args:
            batch: The batch, or its id.
            timeout: The longest wait, in seconds; None is no limit.
            interval: Seconds between the first two polls; later intervals are longer.
            max_interval: The longest interval, in seconds.
            on_poll: Called with the batch of each poll, the last included.

        Raises:
            RequestError: A time is not a number over 0, or `on_poll` is not a function.
            APITimeoutError: The batch has not ended; the server continues its work.
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
                # Random, so that clients that began together do not poll together.
                await anyio.sleep(interval * random.uniform(0.75, 1.0))  # noqa: S311 - no secret
                interval = min(interval * 1.5, max_interval)
        raise APITimeoutError(
            f"The batch {_id_of(batch)} has not ended within {timeout:g} seconds", phase="total"
        )

    async def results(self, batch: Batch | str) -> AsyncGenerator[BatchResult, None]:
        """Iterate over the results of a completed batch, while they are downloaded.

        Results come in any order: `id` and `line_index` name the request. Each comes once,
        also if the download is interrupted and begins again. A line that failed has an
        `error`; so has a line of the file that is not a result (its code is
        ``invalid_line``). The download keeps the reader's pace and at most a line in memory.

        The addresses of the files expire; the client then asks the server for new ones.
        The API key is not sent to these addresses.

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
            # The server may have accepted the file, and its answer was lost. Then there is
            # a batch with the id of the file.
            with contextlib.suppress(MoondreamError):
                return await self.get(upload.file_id)
            raise

    async def _output(
        self, batch: Batch, place: int
    ) -> AsyncGenerator[tuple[int, BatchResult], None]:
        """Yield the numbered results of one file; after a lost connection, from the first again.

        If the file's address has expired, the client asks for a new one, once.
        """
        call, renewed = self._call_for(batch, place), False
        failure: MoondreamError | None = None
        try:
            while True:
                try:
                    body = await call.download(after=failure)
                except APIStatusError as error:
                    if renewed or not 400 <= error.status < 500:
                        raise
                    call.report.ended(error=error)
                    call, renewed = self._call_for(await self.get(batch), place), True
                    failure = None
                    continue
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
        """Yield the numbered results in the body of a download, then close the body."""
        begun, number = bytearray(), 0
        try:
            while (data := await self._next(body)) is not None:
                begun += data
                # Split only where a line ends: a long one is not copied with each piece.
                *lines, begun = begun.split(b"\n") if b"\n" in data else [begun]
                for line in lines:
                    _check_size(line)
                    if line.strip():
                        yield number, _read_line(bytes(line))
                        number += 1
                _check_size(begun)
        finally:
            body.close()
        if begun.strip():
            yield number, _read_last(bytes(begun))

    async def _next(self, body: Body) -> bytes | None:
        """Return the next bytes, or None at the end; `Timeout.idle` limits the wait."""
        idle = self._caller.timeout.idle
        with anyio.move_on_after(idle):
            return await anext(body, None)
        raise APITimeoutError(
            f"Nothing of the results came within {idle:g} seconds (Timeout.idle)", phase="idle"
        )


def _check_size(line: bytearray) -> None:
    if len(line) > MAX_RESULT_BYTES:
        message = f"A line of results is over the limit of {MAX_RESULT_BYTES} bytes"
        raise APIConnectionError(message, permanent=True)


def _read_line(line: bytes) -> BatchResult:
    """Read a line of results; an invalid line becomes a failed result."""
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
    return quote(_id_of(batch), safe="", errors="surrogatepass")
