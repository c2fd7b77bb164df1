"""How each server words an answer, streamed or not, and an error.

==========  ==============================================================
`cloud`     Moondream Cloud, as its documentation prints it
`kestrel`   the HTTP server of the engine behind it: several tokens an event,
            and a final event with text, the whole answer and metrics
`station`   Moondream Station: lenient, without request ids, errors with
            status 200
`old`       ``moondream serve`` of version 0.0.6: paths without ``/v1``, and
            bodies that end with the connection
==========  ==============================================================

Nothing here does I/O: an answer goes in, a body or events come out.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import ClassVar

from .steps import Answer, Body, Event, Reply

MODELS = ("moondream3.1-9B-A2B", "moondream3-preview", "moondream-2B")


class Dialect:
    """The common part of all servers; each server's dialect overrides some of it."""

    name: ClassVar[str]
    prefix: ClassVar[str] = "/v1"
    skills: ClassVar[tuple[str, ...]] = ("caption", "query", "detect", "point")
    lenient: ClassVar[bool] = False
    """Ignores fields and bodies that it can't read."""
    text_only: ClassVar[bool] = False
    """Answers a question without a picture."""
    hosted: ClassVar[bool] = False
    """Has keys, models to choose from, chat, batches and tuning, as the cloud alone has."""
    streams_reasoning: ClassVar[bool] = True
    closes_connections: ClassVar[bool] = False
    """A streamed body ends with the connection."""
    checks_content_type: ClassVar[bool] = False
    """Refuses any content type but ``application/json``, also one with a charset."""
    ascii: ClassVar[bool] = True
    """The JSON of events has escapes for all characters outside ASCII."""
    health: ClassVar[Body] = {"status": "ok"}

    def __init__(self, *, blank_lines: bool = True) -> None:
        self._event_end = "\n\n" if blank_lines else "\n"

    def body(self, answer: Answer) -> Body:
        """Return the answer as one JSON body."""
        return answer.fields()

    def events(self, answer: Answer) -> Iterator[Event]:
        """Yield the answer as events, each made when it is asked for."""
        return self._segment(answer) if answer.skill == "segment" else self._text(answer)

    def _text(self, answer: Answer) -> Iterator[Event]:
        for piece in answer.pieces:
            yield self.encode({"chunk": piece, "completed": False}, tokens=1)
        yield self.encode({"chunk": "", "completed": True}, last=True)

    def _segment(self, answer: Answer) -> Iterator[Event]:
        """Yield the box, the coarse path in pieces, and last the refined path in their place."""
        if answer.result["bbox"] is not None:
            yield self.encode({"type": "bbox", "bbox": answer.result["bbox"]})
        for index, piece in enumerate(answer.pieces):
            delta = {"type": "path_delta", "chunk": piece, "completed": False, "token_index": index}
            yield self.encode(delta, tokens=1)
        final = {"type": "final", "chunk": "", "completed": True, **self.body(answer)}
        yield self.encode(final, last=True)

    def error(self, status: int, message: str, param: str | None = None) -> Reply:
        """Return the reply for an error."""
        del param
        return Reply(status, {"error": message})

    def models(self) -> Body:
        """Return the list of models."""
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]}

    def encode(self, body: Body, *, tokens: int = 0, last: bool = False) -> Event:
        """Return one server-sent event; as in Python's servers, a space comes after ``:``."""
        return self.encode_text(json.dumps(body, ensure_ascii=self.ascii), tokens=tokens, last=last)

    def encode_text(self, data: str, *, tokens: int = 0, last: bool = False) -> Event:
        """Return one server-sent event with this line of data."""
        # Half a surrogate pair, for which UTF-8 has no bytes, is escaped as JSON does it.
        line = f"data: {data}{self._event_end}".encode("utf-8", "backslashreplace")
        return Event(line, tokens=tokens, last=last)


class Cloud(Dialect):
    """Moondream Cloud.

    What the real one does with `reasoning` in a stream is not known; here the final
    event carries it.
    """

    name = "cloud"
    skills = ("caption", "query", "detect", "point", "segment")
    text_only = True
    hosted = True
    ascii = False

    def body(self, answer: Answer) -> Body:
        """Return the answer as one JSON body."""
        head = {"request_id": self._request_id(answer), **answer.fields()}
        return head | {"finish_reason": answer.finish_reason, "metrics": answer.metrics()}

    def _text(self, answer: Answer) -> Iterator[Event]:
        request_id = self._request_id(answer)
        for piece in answer.pieces:
            chunk = {"chunk": piece, "completed": False, "request_id": request_id}
            yield self.encode(chunk, tokens=1)
        final: Body = {"completed": True, "chunk": ""}
        if answer.reasoning is not None:
            final["reasoning"] = answer.reasoning
        final |= {"org_id": "00000000-0000-4000-8000-000000000000", "request_id": request_id}
        yield self.encode(final, last=True)

    def error(self, status: int, message: str, param: str | None = None) -> Reply:
        """Return the reply for an error."""
        kind = {
            401: "authentication_error",
            404: "not_found",
            409: "conflict",
            410: "gone",
            413: "payload_too_large",
            429: "rate_limit_exceeded",
        }.get(status, "invalid_request" if status < 500 else "server_error")
        error = {"message": message, "type": kind, "param": param, "code": kind}
        return Reply(status, {"error": error})

    def _request_id(self, answer: Answer) -> str:
        now = dt.datetime.now(dt.UTC)
        number = answer.number & 0xFFFFFF
        return f"{now:%Y-%m-%d}_{answer.skill}_{now:%Y-%m-%d-%H:%M:%S}-{number:06x}"


class Kestrel(Dialect):
    """The HTTP server that the engine's own package carried."""

    name = "kestrel"
    skills = Cloud.skills
    text_only = True
    streams_reasoning = False

    def body(self, answer: Answer) -> Body:
        """Return the answer as one JSON body."""
        head = {"request_id": str(answer.number), "finish_reason": answer.finish_reason}
        return head | answer.fields() | {"metrics": answer.metrics()}

    def _text(self, answer: Answer) -> Iterator[Event]:
        size = 1 if answer.piece_by_piece else 3
        whole = len(answer.pieces) // size * size
        for start in range(0, whole, size):
            chunk = "".join(answer.pieces[start : start + size])
            body = {"chunk": chunk, "completed": False, "token_index": start + size - 1}
            yield self.encode(body, tokens=size)
        rest = answer.pieces[whole:]  # too few for an event; the final one has them
        final = {"chunk": "".join(rest), "completed": True, **self.body(answer)}
        yield self.encode(final, tokens=len(rest), last=True)


class Station(Dialect):
    """Moondream Station."""

    name = "station"
    lenient = True
    health: ClassVar[Body] = {"status": "ok", "server": "moondream-station"}

    def body(self, answer: Answer) -> Body:
        """Return the answer as one JSON body."""
        count = {"count": len(answer.result["points"])} if "points" in answer.result else {}
        return super().body(answer) | count | {"_stats": self._stats(answer)}

    def _text(self, answer: Answer) -> Iterator[Event]:
        # Station does not stream reasoning.
        for piece in answer.pieces:
            yield self.encode({"chunk": piece}, tokens=1)
        if answer.pieces:
            yield self.encode({"stats": self._stats(answer)}, last=True)
        yield self.encode({"completed": True}, last=True)

    def error(self, status: int, message: str, param: str | None = None) -> Reply:
        """Return the reply for an error; for most, Station's status is 200."""
        del param
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            return Reply(status, {"detail": "Inference service not running"})
        return Reply(200 if status < 429 else status, {"error": message, "status": "error"})

    def models(self) -> Body:
        """Return the list of models, in Station's own shape."""
        more = {"description": "simulated", "version": "1.0"}
        return {"models": [{"id": name, "name": name, **more} for name in MODELS]}

    def _stats(self, answer: Answer) -> Body:
        duration = time.perf_counter() - answer.received
        rate = round(answer.tokens / max(duration, 1e-6), 1)
        return {"tokens": answer.tokens, "duration": round(duration, 2), "tokens_per_sec": rate}


class Old(Dialect):
    """``moondream serve`` of version 0.0.6.

    The real one speaks HTTP/1.0; this one HTTP/1.1 with ``Connection: close``
    and, for streams, neither a length nor chunks. A client sees no difference.
    """

    name = "old"
    prefix = ""
    closes_connections = True
    checks_content_type = True

    def body(self, answer: Answer) -> Body:
        """Return the answer as one JSON body, which has no place for reasoning."""
        return dict(answer.result)


DIALECTS: dict[str, type[Dialect]] = {
    dialect.name: dialect for dialect in (Cloud, Kestrel, Station, Old)
}
