"""The Batch API: a file of requests comes up in parts, files of results go down.

A batch moves on whenever somebody asks for its state, by one stage or by part
of its lines, and at no other time: how often it is looked at, and not the
clock, decides what is seen.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import math
from typing import Any

import anyio.to_thread
import msgspec

from . import answers
from .dialects import MODELS, Body, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Reply, Route
from .storage import Storage, make_id, take_page
from .validation import QueryBody, RefusedError, read_body, read_typed

MAX_PART_BYTES = 100 * 1024 * 1024

# At most half of a batch is done at one look, so that there is progress to see.
_LINES_PER_LOOK = 200
# Few, so that results come in several files.
_LINES_PER_OUTPUT = 10

_SKILLS = ("caption", "query", "detect", "point")


class LineError(Exception):
    """A line of a batch can't be done."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Part(msgspec.Struct, frozen=True, rename="camel"):
    """A part of an upload, as the request that completes it names it."""

    part_number: int
    etag: str


class CompleteBody(msgspec.Struct, frozen=True):
    """The body that completes an upload."""

    parts: list[Part]
    model: str = "moondream3-preview"


class Upload(msgspec.Struct):
    """A file that is coming up."""

    upload_id: str
    parts: dict[int, bytes] = {}


class Batch(msgspec.Struct):
    """A file that was completed, and how far it is done."""

    id: str
    model: str
    data: bytes
    status: str = "chunking"
    lines: list[bytes] = []
    results: list[Body] = []
    outputs: int = 0
    error: Body | None = None
    created_at: dt.datetime = msgspec.field(default_factory=lambda: dt.datetime.now(dt.UTC))
    completed_at: dt.datetime | None = None
    lock: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)

    def fail(self, code: str, message: str) -> None:
        """End it without results."""
        self.status = "failed"
        self.error = {"code": code, "message": message}

    def body(self, storage: Storage, origin: str) -> Body:
        """Return its state, as the API sends it."""
        failed = sum(result["status"] == "error" for result in self.results)
        body: Body = {
            "id": self.id,
            "status": self.status,
            "model": self.model,
            "progress": {
                "total": len(self.lines),
                "completed": len(self.results) - failed,
                "failed": failed,
            },
            "created_at": _tell_time(self.created_at),
        }
        if self.error is not None:
            body["error"] = self.error
        if self.completed_at is not None:
            body["usage"] = {
                kind: sum(result.get("usage", {}).get(kind, 0) for result in self.results)
                for kind in ("input_tokens", "output_tokens")
            }
            body["outputs"] = [
                {"index": index, "url": storage.url(origin, self.output_name(index))}
                for index in range(self.outputs)
            ]
            body["completed_at"] = _tell_time(self.completed_at)
            body["expires_at"] = _tell_time(self.completed_at + dt.timedelta(days=7))
        return body

    def output_name(self, index: int) -> str:
        """Return the name of a file of results in the storage."""
        return f"{self.id}-{index}.jsonl"


class Batches:
    """The uploads and batches of one server."""

    def __init__(self, dialect: Dialect, gallery: Gallery, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/batch"
        self._gallery = gallery
        self._storage = storage
        self._uploads: dict[str, Upload] = {}
        self._batches: dict[str, Batch] = {}
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints; what one does depends on `action` in the query string."""
        one = f"{self._path}/{{id}}"
        return [
            Route("POST", self._path, self._create),
            Route("PUT", one, self._upload_part, uploads=MAX_PART_BYTES),
            Route("POST", one, self._complete),
            Route("DELETE", one, self._abort),
            Route("GET", one, self._get),
            Route("GET", self._path, self._list),
        ]

    async def _create(self, received: ReceivedRequest) -> Reply:
        _expect_action(received, "mpu-create")
        self._created += 1
        file_id = make_id(self._created)
        upload_id = hashlib.sha256(file_id.encode()).hexdigest()[:24]
        self._uploads[file_id] = Upload(upload_id)
        key = f"requests/simulated/{file_id}.jsonl"
        return Reply(body={"fileId": file_id, "uploadId": upload_id, "key": key})

    async def _upload_part(self, received: ReceivedRequest) -> Reply:
        _expect_action(received, "mpu-uploadpart")
        upload = self._find_upload(received)
        number = received.query.get("partNumber", "")
        if not number.isdigit() or not 1 <= int(number) <= 10_000:
            raise RefusedError("partNumber must be between 1 and 10000", param="partNumber")
        upload.parts[int(number)] = received.body
        return Reply(body={"partNumber": int(number), "etag": _make_etag(received.body)})

    async def _complete(self, received: ReceivedRequest) -> Reply:
        _expect_action(received, "mpu-complete")
        upload = self._find_upload(received)
        body = read_typed(received.body, CompleteBody)
        for part in body.parts:
            data = upload.parts.get(part.part_number)
            if data is None or part.etag != _make_etag(data):
                raise RefusedError(
                    f"Part {part.part_number} is missing or its etag differs", param="parts"
                )
        data = b"".join(
            upload.parts[part.part_number]
            for part in sorted(body.parts, key=lambda part: part.part_number)
        )
        file_id = received.params["id"]
        del self._uploads[file_id]
        batch = self._batches[file_id] = Batch(file_id, body.model, data)
        return Reply(body={"id": batch.id, "status": batch.status, "size": len(data)})

    async def _abort(self, received: ReceivedRequest) -> Reply:
        _expect_action(received, "mpu-abort")
        self._find_upload(received)
        del self._uploads[received.params["id"]]
        return Reply(body={"ok": True})

    async def _get(self, received: ReceivedRequest) -> Reply:
        batch = self._batches.get(received.params["id"])
        if batch is None:
            raise RefusedError("No such batch", status=404)
        async with batch.lock:
            body = batch.body(self._storage, received.origin)
            if batch.status in {"chunking", "processing"}:
                await anyio.to_thread.run_sync(self._move_on, batch)
        return Reply(body=body)

    async def _list(self, received: ReceivedRequest) -> Reply:
        newest_first = reversed(self._batches.values())
        batches = [batch.body(self._storage, received.origin) for batch in newest_first]
        return Reply(body=take_page("batches", batches, received.query))

    def _find_upload(self, received: ReceivedRequest) -> Upload:
        upload = self._uploads.get(received.params["id"])
        if upload is None or received.query.get("uploadId") != upload.upload_id:
            raise RefusedError("No such upload", status=404, param="uploadId")
        return upload

    def _move_on(self, batch: Batch) -> None:
        """Take a batch one stage on, or do some of its lines. Blocks."""
        if batch.status == "chunking":
            _chunk(batch)
            return
        done = len(batch.results)
        step = min(_LINES_PER_LOOK, math.ceil(len(batch.lines) / 2))
        batch.results += [
            self._do_line(index, line)
            for index, line in enumerate(batch.lines[done : done + step], done)
        ]
        if len(batch.results) == len(batch.lines):
            self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        # The order of results is promised to nobody; here it is never that of the lines.
        results = batch.results[::-1]
        for start in range(0, len(results), _LINES_PER_OUTPUT):
            some = results[start : start + _LINES_PER_OUTPUT]
            lines = b"".join(msgspec.json.encode(result) + b"\n" for result in some)
            self._storage.put(batch.output_name(batch.outputs), lines)
            batch.outputs += 1
        batch.status = "completed"
        batch.completed_at = dt.datetime.now(dt.UTC)

    def _do_line(self, index: int, line: bytes) -> Body:
        result: Body = {"line_index": index}
        try:
            request = msgspec.json.decode(line, type=dict[str, Any])
            if "id" in request:
                result["id"] = request["id"]
            return result | {"status": "ok"} | self._solve(request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            error = {"code": "invalid_request", "message": "The line is no JSON object"}
        except LineError as line_error:
            error = {"code": line_error.code, "message": line_error.message}
        except RefusedError as refused:
            undecodable = refused.param == "image_url"
            code = "image_decode_failed" if undecodable else "invalid_request"
            error = {"code": code, "message": refused.message}
        return result | {"status": "error", "error": error}

    def _solve(self, request: Body) -> Body:
        name = request.get("skill")
        if name not in _SKILLS:
            raise LineError("unknown_skill", f"Unknown skill {name!r}")
        images = request.get("images") if name == "query" else None
        if images is None:
            images = [request.get("image")]
        if (
            not isinstance(images, list)
            or not images
            or not all(isinstance(image, str) and image for image in images)
        ):
            raise LineError("invalid_request", "Field 'image' is required")
        if any(image.startswith("data:") for image in images):
            raise LineError("image_decode_failed", "The image must be bare base64, no data URL")
        skill = SKILLS[name]
        reasoning = {"reasoning": True} if name == "query" else {}
        body = read_body(reasoning | request | {"image_url": images[0]}, skill.body)
        pictures = [self._gallery.look_blocking(image) for image in images]
        answer = skill.solve(body, pictures[0])
        result = dict(answer.result)
        if isinstance(body, QueryBody) and len(pictures) > 1:
            result["answer"] = answers.answer_about_several(pictures, body.question)
        if answer.reasoning is not None:
            result["reasoning"] = answer.reasoning
        return {"result": result, "usage": answer.usage()}


def _chunk(batch: Batch) -> None:
    """Cut a file into lines. What a client can know before it sends it is not checked again."""
    batch.lines, batch.data = batch.data.splitlines(), b""
    if batch.model.partition("/")[0] not in MODELS:
        batch.fail("invalid_model", f"Unknown model {batch.model!r}")
    elif not batch.lines:
        batch.fail("empty_batch", "The file has no lines")
    else:
        batch.status = "processing"


def _expect_action(received: ReceivedRequest, action: str) -> None:
    if received.query.get("action") != action:
        raise RefusedError(f"action must be {action}", param="action")


def _make_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _tell_time(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
