"""The Batch API: clients upload a file of requests in parts, and download files of results.

A batch advances at each request for its state, by one stage or by some of its lines, and
at no other time: the number of requests, and not the clock, decides what a client sees.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import math
import re
from typing import Annotated

import anyio.to_thread
import msgspec

from . import answers
from .dialects import MODELS, Dialect
from .gallery import Gallery
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Body, Route
from .storage import Storage, make_id, take_page
from .validation import QueryBody, RefusedError, read_body, read_typed

MAX_PART_BYTES = 100 * 1024 * 1024

# For one request, and at most half of the batch, so that there is progress to see.
_LINES_PER_LOOK = 200
_LINES_PER_OUTPUT = 10  # few, so that results come in several files

_SKILLS = ("caption", "query", "detect", "point")
_Image = Annotated[str, msgspec.Meta(min_length=1)]
_Images = Annotated[list[_Image], msgspec.Meta(min_length=1)]


class _Part(msgspec.Struct, frozen=True, rename="camel"):
    part_number: int
    etag: str


class _Complete(msgspec.Struct, frozen=True):
    parts: list[_Part]
    model: str = "moondream3-preview"


class _Upload(msgspec.Struct):
    upload_id: str
    parts: dict[int, bytes] = {}


class _Batch:
    """A completed file, and the state of its lines."""

    def __init__(self, batch_id: str, model: str, data: bytes) -> None:
        self.lines = data.splitlines()
        self.results: list[Body] = []
        self.outputs: list[str] = []  # names of files in the storage
        self.lock = asyncio.Lock()
        self.state: Body = {
            "id": batch_id,
            "status": "chunking",
            "model": model,
            "progress": {"total": 0, "completed": 0, "failed": 0},
            "created_at": _tell_time(dt.datetime.now(dt.UTC)),
        }

    def body(self, storage: Storage, origin: str) -> Body:
        """Return its state, as the API sends it."""
        if not self.outputs:
            return dict(self.state)
        urls = enumerate(storage.url(origin, name) for name in self.outputs)
        return self.state | {"outputs": [{"index": index, "url": url} for index, url in urls]}


class Batches:
    """The uploads and batches of one server."""

    def __init__(self, dialect: Dialect, gallery: Gallery, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/batch"
        self._gallery = gallery
        self._storage = storage
        self._uploads: dict[str, _Upload] = {}
        self._batches: dict[str, _Batch] = {}
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints; most want an `action` in the query string."""
        one = f"{self._path}/{{id}}"
        return [
            Route("POST", self._path, self._create),
            Route("PUT", one, self._upload_part, uploads=MAX_PART_BYTES),
            Route("POST", one, self._complete),
            Route("DELETE", one, self._abort),
            Route("GET", one, self._get),
            Route("GET", self._path, self._list),
        ]

    async def _create(self, received: ReceivedRequest) -> Body:
        _expect_action(received, "mpu-create")
        self._created += 1
        file_id = make_id(self._created)
        upload_id = hashlib.sha256(file_id.encode()).hexdigest()[:24]
        self._uploads[file_id] = _Upload(upload_id)
        key = f"requests/simulated/{file_id}.jsonl"
        return {"fileId": file_id, "uploadId": upload_id, "key": key}

    async def _upload_part(self, received: ReceivedRequest) -> Body:
        upload = self._find_upload(received, "mpu-uploadpart")
        number = received.query.get("partNumber", "")
        if not re.fullmatch("[0-9]{1,5}", number) or not 1 <= int(number) <= 10_000:
            raise RefusedError("partNumber must be between 1 and 10000", param="partNumber")
        upload.parts[int(number)] = received.body
        return {"partNumber": int(number), "etag": _make_etag(received.body)}

    async def _complete(self, received: ReceivedRequest) -> Body:
        upload = self._find_upload(received, "mpu-complete")
        body = read_typed(received.body, _Complete)
        pieces = []
        for part in sorted(body.parts, key=lambda part: part.part_number):
            data = upload.parts.get(part.part_number)
            if data is None or part.etag != _make_etag(data):
                message = f"Part {part.part_number} is missing or its etag differs"
                raise RefusedError(message, param="parts")
            pieces.append(data)
        data = b"".join(pieces)
        file_id = received.params["id"]
        del self._uploads[file_id]
        self._batches[file_id] = _Batch(file_id, body.model, data)
        return {"id": file_id, "status": "chunking", "size": len(data)}

    async def _abort(self, received: ReceivedRequest) -> Body:
        self._find_upload(received, "mpu-abort")
        del self._uploads[received.params["id"]]
        return {"ok": True}

    async def _get(self, received: ReceivedRequest) -> Body:
        batch = self._batches.get(received.params["id"])
        if batch is None:
            raise RefusedError("No such batch", status=404)
        async with batch.lock:
            body = batch.body(self._storage, received.origin)
            if body["status"] in {"chunking", "processing"}:
                await anyio.to_thread.run_sync(self._move_on, batch)
        return body

    async def _list(self, received: ReceivedRequest) -> Body:
        newest_first = reversed(self._batches.values())
        batches = [batch.body(self._storage, received.origin) for batch in newest_first]
        return take_page("batches", batches, received.query)

    def _find_upload(self, received: ReceivedRequest, action: str) -> _Upload:
        _expect_action(received, action)
        upload = self._uploads.get(received.params["id"])
        if upload is None or received.query.get("uploadId") != upload.upload_id:
            raise RefusedError("No such upload", status=404, param="uploadId")
        return upload

    def _move_on(self, batch: _Batch) -> None:
        """Advance a batch by one stage, or by some of its lines. Blocks.

        Limits that the client checks are not checked again here.
        """
        total, done = len(batch.lines), len(batch.results)
        error = None
        if batch.state["model"].partition("/")[0] not in MODELS:
            message = f"Unknown model {batch.state['model']!r}"
            error = {"code": "invalid_model", "message": message}
        elif not batch.lines:
            error = {"code": "empty_batch", "message": "The file has no lines"}
        elif batch.state["status"] == "processing":
            step = min(_LINES_PER_LOOK, math.ceil(total / 2))
            some = enumerate(batch.lines[done : done + step], done)
            batch.results += [self._do_line(index, line) for index, line in some]
            done = len(batch.results)
        failed = sum(result["status"] == "error" for result in batch.results)
        progress = {"total": total, "completed": done - failed, "failed": failed}
        if error is not None:
            batch.state |= {"status": "failed", "progress": progress, "error": error}
        elif done == total:
            self._finish(batch, progress)
        else:
            batch.state |= {"status": "processing", "progress": progress}

    def _finish(self, batch: _Batch, progress: Body) -> None:
        # The API promises no order of results; here the order is never that of the lines.
        results = batch.results[::-1]
        for start in range(0, len(results), _LINES_PER_OUTPUT):
            name = f"{batch.state['id']}-{len(batch.outputs)}.jsonl"
            some = results[start : start + _LINES_PER_OUTPUT]
            self._storage.put(name, b"".join(msgspec.json.encode(one) + b"\n" for one in some))
            batch.outputs.append(name)
        now = dt.datetime.now(dt.UTC)
        batch.state |= {
            "status": "completed",
            "progress": progress,
            "usage": {
                kind: sum(result["usage"][kind] for result in results if "usage" in result)
                for kind in ("input_tokens", "output_tokens")
            },
            "completed_at": _tell_time(now),
            "expires_at": _tell_time(now + dt.timedelta(days=7)),
        }

    def _do_line(self, index: int, line: bytes) -> Body:
        result: Body = {"line_index": index}
        try:
            request = msgspec.json.decode(line, type=Body)
            if "id" in request:
                result["id"] = request["id"]
            return result | {"status": "ok"} | self._solve(request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            error = {"code": "invalid_request", "message": "The line is no JSON object"}
        except RefusedError as refused:
            codes = {"skill": "unknown_skill", "image_url": "image_decode_failed"}
            code = codes.get(refused.param or "", "invalid_request")
            error = {"code": code, "message": refused.message}
        return result | {"status": "error", "error": error}

    def _solve(self, request: Body) -> Body:
        name = request.get("skill")
        if name not in _SKILLS:
            raise RefusedError(f"Unknown skill {name!r}", param="skill")
        images = request.get("images") if name == "query" else None
        try:
            images = msgspec.convert([request.get("image")] if images is None else images, _Images)
        except msgspec.ValidationError:
            raise RefusedError("Field 'image' is required") from None
        if any(image.startswith("data:") for image in images):
            raise RefusedError("The image must be bare base64, no data URL", param="image_url")
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


def _expect_action(received: ReceivedRequest, action: str) -> None:
    if received.query.get("action") != action:
        raise RefusedError(f"action must be {action}", param="action")


def _make_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _tell_time(time: dt.datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"
