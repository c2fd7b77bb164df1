"""The Batch API: clients upload a file of requests in parts, and download files of results.

A batch advances at each request for its state, by one stage or by some of its lines, and
at no other time: the number of requests, and not the clock, decides what a client sees.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import threading
from collections.abc import Awaitable, Iterator
from typing import Annotated

import msgspec

from .dialects import MODELS, Dialect
from .received import ReceivedRequest
from .skills import SKILLS
from .steps import Body, Route
from .storage import Storage, make_id, take_page
from .validation import RefusedError, read_body, read_typed

# For one request, and at most half of the batch, so that there is progress to see.
_LINES_PER_LOOK = 200
_LINES_PER_OUTPUT = 10  # few, so that results come in several files

_Image = Annotated[str, msgspec.Meta(min_length=1)]
_Images = Annotated[list[_Image], msgspec.Meta(min_length=1)]


class _Numbered(msgspec.Struct, frozen=True, rename="camel"):
    part_number: Annotated[int, msgspec.Meta(ge=1, le=10_000)]


class _Part(_Numbered, frozen=True, rename="camel"):
    etag: str


class _Complete(msgspec.Struct, frozen=True):
    parts: list[_Part]
    model: str = "moondream3-preview"


class Batches:
    """The uploads and batches of one server."""

    def __init__(self, dialect: Dialect, storage: Storage) -> None:
        self._path = f"{dialect.prefix}/batch"
        self._storage = storage
        self._uploads: dict[tuple[str, str], dict[int, bytes]] = {}  # the numbered parts of each
        self._batches: dict[str, Body] = {}  # the state of each, as the API sends it
        self._later: dict[str, Iterator[Body]] = {}  # the states to come
        self._working = threading.Lock()
        self._created = 0

    def routes(self) -> list[Route]:
        """Return the endpoints; most want an `action` in the query string."""
        one = f"{self._path}/{{id}}"
        return [
            Route("POST", self._path, self._create),
            Route("PUT", one, self._upload_part),
            Route("POST", one, self._complete),
            Route("DELETE", one, self._abort),
            Route("GET", one, self._get),
            Route("GET", self._path, self._list),
        ]

    def _create(self, received: ReceivedRequest) -> Body:
        _expect_action(received, "mpu-create")
        self._created += 1
        file_id, upload_id = make_id(self._created), f"upload-{self._created}"
        self._uploads[file_id, upload_id] = {}
        key = f"requests/simulated/{file_id}.jsonl"
        return {"fileId": file_id, "uploadId": upload_id, "key": key}

    def _upload_part(self, received: ReceivedRequest) -> Body:
        upload = self._find_upload(received, "mpu-uploadpart")
        number = read_typed({**received.query}, _Numbered, strict=False).part_number
        self._uploads[upload][number] = received.body
        return {"partNumber": number, "etag": _make_etag(received.body)}

    def _complete(self, received: ReceivedRequest) -> Body:
        upload = self._find_upload(received, "mpu-complete")
        body = read_typed(received.body, _Complete)
        parts = self._uploads[upload]
        for part in body.parts:
            number = part.part_number
            if number not in parts or part.etag != _make_etag(parts[number]):
                raise RefusedError(f"Part {number} is missing or its etag differs", param="parts")
        data = b"".join(parts[number] for number in sorted(part.part_number for part in body.parts))
        del self._uploads[upload]
        file_id = received.params["id"]
        self._later[file_id] = self._work(file_id, body.model, data.splitlines(), received.origin)
        self._batches[file_id] = next(self._later[file_id])
        return {"id": file_id, "status": "chunking", "size": len(data)}

    def _abort(self, received: ReceivedRequest) -> Body:
        del self._uploads[self._find_upload(received, "mpu-abort")]
        return {"ok": True}

    def _get(self, received: ReceivedRequest) -> Awaitable[Body]:
        batch_id = received.params["id"]
        if batch_id not in self._batches:
            raise RefusedError("No such batch", status=404)
        return received.find(self._advance, batch_id)

    def _advance(self, batch_id: str) -> Body:
        with self._working:  # the thread of a request whose client has left goes on
            seen = self._batches[batch_id]
            self._batches[batch_id] = next(self._later[batch_id], seen)
            return seen

    def _list(self, received: ReceivedRequest) -> Body:
        return take_page("batches", [*self._batches.values()][::-1], received.query)

    def _find_upload(self, received: ReceivedRequest, action: str) -> tuple[str, str]:
        _expect_action(received, action)
        upload = (received.params["id"], received.query.get("uploadId", ""))
        if upload not in self._uploads:
            raise RefusedError("No such upload", status=404, param="uploadId")
        return upload

    def _work(self, file_id: str, model: str, lines: list[bytes], origin: str) -> Iterator[Body]:
        """Yield the states of a batch, one after the other. Blocks.

        Limits that the client checks are not checked again here.
        """
        results: list[Body] = []
        head = {"id": file_id, "model": model, "created_at": _time_in()}

        def state(status: str, **more: object) -> Body:
            failed = sum(result["status"] == "error" for result in results)
            counted = {"completed": len(results) - failed, "failed": failed}
            total = 0 if status == "chunking" else len(lines)
            return head | {"status": status, "progress": {"total": total, **counted}} | more

        yield state("chunking")
        error = None
        if model.partition("/")[0] not in MODELS:
            error = {"code": "invalid_model", "message": f"Unknown model {model!r}"}
        elif not lines:
            error = {"code": "empty_batch", "message": "The file has no lines"}
        if error:
            yield state("failed", error=error)
            return
        step = min(_LINES_PER_LOOK, (len(lines) + 1) // 2)
        for start in range(0, len(lines), step):
            yield state("processing")
            results += map(self._do_line, range(start, len(lines)), lines[start : start + step])
        usages = [result.get("usage", {}) for result in results]
        results.reverse()  # the API promises no order; here it is never that of the lines
        outputs = []
        for start in range(0, len(results), _LINES_PER_OUTPUT):
            index = start // _LINES_PER_OUTPUT
            some = msgspec.json.Encoder().encode_lines(results[start : start + _LINES_PER_OUTPUT])
            url = self._storage.put(origin, f"{file_id}-{index}.jsonl", some)
            outputs.append({"index": index, "url": url})
        yield state(
            "completed",
            usage={
                kind: sum(usage.get(kind, 0) for usage in usages)
                for kind in ("input_tokens", "output_tokens")
            },
            outputs=outputs,
            completed_at=_time_in(),
            expires_at=_time_in(days=7),
        )

    def _do_line(self, index: int, line: bytes) -> Body:
        result: Body = {"line_index": index}
        try:
            request = msgspec.json.decode(line, type=Body)
            if "id" in request:
                result["id"] = request["id"]
            return result | {"status": "ok"} | self._answer(request)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            error = {"code": "invalid_request", "message": "The line is no JSON object"}
        except RefusedError as refused:
            codes = {"skill": "unknown_skill", "image_url": "image_decode_failed"}
            code = codes.get(refused.param or "", "invalid_request")
            error = {"code": code, "message": refused.message}
        return result | {"status": "error", "error": error}

    def _answer(self, request: Body) -> Body:
        name = request.get("skill")
        if name not in ("caption", "query", "detect", "point"):
            raise RefusedError(f"Unknown skill {name!r}", param="skill")
        several = request.get("images") if name == "query" else None
        try:
            given = [request.get("image")] if several is None else several
            first, *more = msgspec.convert(given, _Images)
        except msgspec.ValidationError:
            raise RefusedError("Field 'image' is required") from None
        if any(image.startswith("data:") for image in (first, *more)):
            raise RefusedError("The image must be bare base64, no data URL", param="image_url")
        skill = SKILLS[name]
        body = read_body({"reasoning": True, **request, "image_url": first}, skill.body)
        answer = skill.answer(body, *more)
        return {"result": answer.fields(), "usage": answer.usage()}


def _expect_action(received: ReceivedRequest, action: str) -> None:
    if received.query.get("action") != action:
        raise RefusedError(f"action must be {action}", param="action")


def _make_etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _time_in(*, days: int = 0) -> str:
    return f"{dt.datetime.now(dt.UTC) + dt.timedelta(days):%Y-%m-%dT%H:%M:%SZ}"
