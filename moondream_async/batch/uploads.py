"""The upload of a batch: writes requests into a file, and sends the file in parts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias
from urllib.parse import quote, urlencode

import anyio
import anyio.to_thread

from moondream_async._call.pages import each
from moondream_async._protocol.requests import Request
from moondream_async._transport.files import FileSlice, SharedFile
from moondream_async.errors import ImageError, MoondreamError, RequestError, ServerError
from moondream_async.types import EncodedImage

from .wire import MAX_FILE_BYTES, MAX_IMAGE_BYTES, BatchRequest, Tally, check_lines

if TYPE_CHECKING:
    from moondream_async._call.call import Caller

Requests: TypeAlias = Iterable[BatchRequest] | AsyncIterable[BatchRequest]
Progress: TypeAlias = Callable[[int, int], object]

_PICTURES_AT_ONCE = 4  # prepared together, and in memory together
_PARTS_AT_ONCE = 3  # so that the others continue while one is slow or waits for a retry
_CHECK_BYTES = 1024 * 1024  # read and checked in one step
_ABORT_TIMEOUT = 10.0  # seconds


@contextlib.asynccontextmanager
async def open_checked(path: str | os.PathLike[str]) -> AsyncIterator[SharedFile]:
    """Open a file of requests, and check every line.

    Raises:
        RequestError: The file can't be opened, or the server would refuse it.
    """
    async with _closing(_open(Path(path))) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise RequestError(f"{os.fspath(path)!r} is over the limit of {MAX_FILE_BYTES:,} bytes")
        tally = Tally()
        while await anyio.to_thread.run_sync(_check, file, tally):
            pass
        yield SharedFile(file, file.tell())


def _open(path: Path) -> BinaryIO:
    try:
        # A pipe is not opened: that might block for ever.
        file = path.open("rb") if stat.S_ISREG(path.stat().st_mode) else None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{str(path)!r} can't be opened: {reason}") from error
    if file is None:
        raise RequestError(f"{str(path)!r} is not a regular file")
    return file


def _check(file: BinaryIO, tally: Tally) -> bool:
    try:
        return check_lines(file, tally, _CHECK_BYTES)
    except OSError as error:
        raise MoondreamError(f"The file can't be read: {error}") from error


@contextlib.asynccontextmanager
async def spooled(caller: Caller, requests: Requests) -> AsyncIterator[SharedFile]:
    """Write requests to a temporary file without a name, which closing deletes.

    Raises:
        RequestError: The server would refuse the file.
        ImageError: A picture can't be sent.
        MoondreamError: The file can't be written, for example since the disk is full.
    """
    tally = Tally()
    async with (
        _closing(tempfile.TemporaryFile()) as file,
        contextlib.aclosing(each(requests)) as given,
    ):
        group: list[BatchRequest] = []
        async for request in given:
            if not isinstance(request, BatchRequest):
                where = f"line {tally.lines + len(group) + 1} of the batch"
                raise RequestError(f"{where} must be a BatchRequest, not {request!r:.100}")
            group.append(request)
            if len(group) == _PICTURES_AT_ONCE:
                await _write(caller, group, file, tally)
                group.clear()
        await _write(caller, group, file, tally)
        tally.check_any()
        yield SharedFile(file, tally.size)


async def _write(
    caller: Caller, requests: list[BatchRequest], file: BinaryIO, tally: Tally
) -> None:
    """Prepare the pictures of some requests together; write the lines in order."""

    async def prepare(request: BatchRequest) -> list[EncodedImage]:
        caller.check_open()
        limit = MAX_IMAGE_BYTES // len(request.images)
        return [await caller.encode(one, max_bytes=limit) for one in request.images]

    prepared = await asyncio.gather(*map(prepare, requests), return_exceptions=True)
    for request, images in zip(requests, prepared, strict=True):
        if isinstance(images, ImageError):
            raise ImageError(f"{tally.where}: {images}") from images.__cause__
        if isinstance(images, BaseException):
            raise images
        line = await anyio.to_thread.run_sync(request.line, images)
        tally.add(len(line), request.id)
        try:
            await anyio.to_thread.run_sync(_write_line, file, line)
        except OSError as error:
            raise MoondreamError(
                f"The batch can't be written to {tempfile.gettempdir()}: {error}. "
                "TMPDIR may name a place with more room."
            ) from error


def _write_line(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()


@contextlib.asynccontextmanager
async def _closing(file: Any) -> AsyncIterator[BinaryIO]:
    """Close a file in a thread: to delete a large file takes a while."""
    try:
        yield file
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(file.close)


class Upload:
    """The upload of one file in parts."""

    def __init__(self, caller: Caller, created: dict[str, Any]) -> None:
        file_id, upload_id = created.get("fileId"), created.get("uploadId")
        if not isinstance(file_id, str) or not isinstance(upload_id, str):
            raise ServerError("The server gave no fileId and uploadId", status=200, body=created)
        self.file_id = file_id
        self._caller = caller
        self._upload_id = upload_id
        self._etags: dict[int, str] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def begin(cls, caller: Caller) -> AsyncIterator[Upload]:
        """Begin an upload; leaving the block by an exception aborts the upload."""
        upload = cls(caller, await caller.call(Request(None, "/batch?action=mpu-create")).json())
        try:
            yield upload
        except BaseException:
            await upload._abort()
            raise

    async def send(self, parts: list[FileSlice], on_progress: Progress | None) -> None:
        """Send all parts, a few at once; each is a call with the client's retries."""
        total = sum(part.size for part in parts)
        sent = 0
        waiting = enumerate(parts, 1)
        failures: list[Exception] = []

        async def work() -> None:
            nonlocal sent
            try:
                for number, part in waiting:
                    await self._send_part(number, part)
                    sent += part.size
                    if on_progress is not None:
                        on_progress(sent, total)
            except Exception as error:  # noqa: BLE001 - raised below, without an ExceptionGroup
                failures.append(error)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for _ in range(min(_PARTS_AT_ONCE, len(parts))):
                group.start_soon(work)
        if failures:
            raise failures[0]

    async def complete(self, model: str) -> dict[str, Any]:
        """Complete the upload; return the server's record of the batch."""
        parts = [
            {"partNumber": number, "etag": self._etags[number]} for number in sorted(self._etags)
        ]
        request = Request(None, self._path("mpu-complete"), {"parts": parts, "model": model})
        return await self._caller.call(request).record()

    async def _send_part(self, number: int, part: FileSlice) -> None:
        path = self._path("mpu-uploadpart", partNumber=number)
        reply = await self._caller.call(Request(None, path, method="PUT", upload=part)).json()
        etag = reply.get("etag")
        if not isinstance(etag, str):
            raise ServerError("The server gave no etag for a part", status=200, body=reply)
        self._etags[number] = etag

    async def _abort(self) -> None:
        """Ask the server to abort the upload; a failure of this is ignored."""
        request = Request(None, self._path("mpu-abort"), method="DELETE")
        with (
            anyio.move_on_after(_ABORT_TIMEOUT, shield=True),
            contextlib.suppress(MoondreamError),
        ):
            async with self._caller.apart() as caller:
                await caller.call(request, max_retries=2).record()

    def _path(self, action: str, **more: int) -> str:
        query = urlencode({"action": action, "uploadId": self._upload_id, **more})
        return f"/batch/{quote(self.file_id, safe='')}?{query}"
