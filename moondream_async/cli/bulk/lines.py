"""The lines of a journal: results and errors as JSON, and lines that users may have edited."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import msgspec

from moondream_async.cli._output import json_text
from moondream_async.errors import APIStatusError, MoondreamError
from moondream_async.results import Result

from .sources import Contents

BEGINNING = b'{"path":"'
"""How each line of ours begins, also a line that was not written to its end."""
ASKED = ("skill", "question", "object", "length", "reasoning", "model", "settings", "asks")
"""The keys of a line that say what was asked."""

Key = bytes
Outcome = Result | MoondreamError | Mapping[str, Any]
Records = Callable[[], Iterable[dict[str, Any]]]
"""Returns the lines of a journal, from the first one at each call."""

_TEXTS: tuple[str, ...] = ("path", *ASKED[:4], "model", "caption", "answer", "reasoning_text")
_TEXTS += ("request_id", "finish_reason", "outline")
_Number = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]  # finite
_Count = Annotated[float, msgspec.Meta(gt=-(2**63), lt=2**63)]


class _Box(msgspec.Struct):
    x_min: _Number
    y_min: _Number
    x_max: _Number
    y_max: _Number


class _Point(msgspec.Struct):
    x: _Number
    y: _Number


BOX = _Box.__struct_fields__


def key_of(name: str, asked: Mapping[str, Any]) -> Key:
    """Return a key for a picture and what is asked about it; a line says both."""
    about = [name, *(asked.get(each) for each in ASKED)]
    return hashlib.blake2b(encode(about), digest_size=16).digest()


def encode(value: Any) -> bytes:
    r"""Return a value as JSON. Halves of surrogate pairs, which UTF-8 has not, are replaced.

    >>> encode({"caption": "a \ud83d cat"}).decode()
    '{"caption":"a � cat"}'
    """
    return whole(json_text(value)).encode()


def whole(text: str) -> str:
    """Return a text with halves of surrogate pairs joined, or replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def decode(data: bytes) -> dict[str, Any]:
    """Return a line's object; ValueError where the line is none."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        try:
            value = json.loads(data.decode())  # knows halves of surrogate pairs
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - the file's contents are wrong
    return value


def read_line(data: bytes) -> dict[str, Any]:
    """Return a line's object; ValueError where it is no result."""
    record = decode(data)
    if not (isinstance(record.get("path"), str) and isinstance(record.get("skill"), str)):
        raise ValueError("it is no result")  # noqa: TRY004 - the file's contents are wrong
    return record


def fields_of(outcome: Outcome) -> dict[str, Any]:
    """Return the keys of a line that say what became of a picture."""
    if isinstance(outcome, MoondreamError):
        error = {"type": type(outcome).__name__, "message": str(outcome)}
        status = {"status": outcome.status} if isinstance(outcome, APIStatusError) else {}
        return {"error": error | status}
    fields = dict(outcome)
    if not isinstance(outcome, Result):
        return fields
    # In a line, `reasoning` says whether the model was asked to think.
    thought = fields.pop("reasoning", None)
    if thought:
        fields["reasoning_text"] = thought["text"]
    if "path" in fields:  # of a segment; a line's path is the picture's
        fields["outline"] = fields.pop("path")
    return fields


def answer_of(record: Mapping[str, Any]) -> Any:
    """Return the caption or the answer of a line; None where there is neither."""
    return record.get("caption") if record.get("answer") is None else record["answer"]


def text_of(record: Mapping[str, Any]) -> str | None:
    """Return an answer for a text file: in one line, or with a line for each box.

    A box is written as in YOLO's labels: the class, the box's middle, its width and its
    height, from 0 to 1. None is for points and outlines, which have no such form.
    """
    text = answer_of(record)
    if isinstance(text, str):
        return whole(" ".join(text.split()))
    if not isinstance(objects := record.get("objects"), list):
        return None
    corners = (msgspec.structs.astuple(box) for each in objects if (box := _valid(each, _Box)))
    return "\n".join(
        f"0 {(left + right) / 2:.6f} {(top + bottom) / 2:.6f} {right - left:.6f} {bottom - top:.6f}"
        for left, top, right, bottom in corners
    )


def tidy(record: dict[str, Any]) -> dict[str, Any]:
    """Return a line whose known keys have values of their types, also after a user's edits.

    Values of other types are left out.
    """
    tidied = dict(record)
    for name in _TEXTS:
        if isinstance(value := tidied.pop(name, None), str):
            tidied[name] = whole(value)
    answers = _valid(tidied.get("asks"), dict) or {}
    for name, kind in {**dict.fromkeys(answers, str), "row": dict, "asks": dict}.items():
        if not isinstance(tidied.get(name, kind()), kind):
            del tidied[name]
    for name, place in (("objects", _Box), ("points", _Point)):
        if name in tidied:
            valid = (_valid(each, place) for each in _valid(tidied[name], list) or ())
            tidied[name] = [msgspec.structs.asdict(each) for each in valid if each is not None]
    error = tidied.pop("error", None)
    if error is not None:
        error = error if isinstance(error, dict) else {"message": error}
        words = {name: whole(str(error.get(name) or "")) for name in ("type", "message")}
        tidied["error"] = {**error, **words}
    contents = contents_of(tidied.pop("file", None))
    if contents is not None:
        tidied["file"] = msgspec.structs.asdict(contents)
    tidied["metrics"] = _valid(tidied.get("metrics"), dict) or {}
    said = {**tidied["metrics"], "tries": tidied.get("tries")}
    for name in ("input_tokens", "output_tokens", "tries"):
        number = _valid(said.get(name), _Count)
        tidied[name] = None if number is None else int(number)
    numbers = {"seconds", "time"} & tidied.keys()
    return {**tidied, **{name: _valid(tidied[name], _Number) for name in numbers}}


def contents_of(value: Any) -> Contents | None:
    """Return the state of a file, as it stands in a line."""
    contents: Contents | None = _valid(value, Contents)
    if contents is None or max(abs(contents.size), abs(contents.mtime_ns)) >= 2**63:
        return None
    return contents


def _valid(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None
