"""What is asked about each picture, and a picture that is being asked about."""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from glob import has_magic
from typing import TYPE_CHECKING, Any

from moondream_async._images import can_prepare
from moondream_async.bulk import BulkItem, BulkResult
from moondream_async.errors import RequestError

from .containers import is_table, odd_header
from .lines import ASKED, Outcome, fields_of, whole
from .shards import is_shard
from .sources import Contents, Found, read

if TYPE_CHECKING:
    from moondream_async import EncodedImage, MoondreamClient

_AHEAD = 8  # pictures that are prepared before they are asked about
_COLUMN = re.compile(r"\{([^{}]+)\}")
_MUST_BE_COLUMN = re.compile(r"\{[^\W\d][\w.-]*\}")
"""Braces that are no text, as ``{"a": 1}`` is; other braces are text where no column fits."""
_FILLED = ("question", "object")
_TAKEN = {*ASKED, "path", "row", "time", "file", "tries", "seconds", "metrics", "objects", "points"}
_TAKEN |= {"error", "error_type", "request_id", "finish_reason", "input_tokens", "output_tokens"}
"""The keys of a line that no answer may have: their values say something else."""


class Questions:
    """A skill and its arguments, or several questions in place of one.

    ``{column}`` in a question or an object stands for the value in the picture's row; with
    `rows` false, no picture has a row.
    """

    def __init__(
        self,
        skill: str,
        arguments: Mapping[str, Any],
        asks: Mapping[str, str],
        model: str | None,
        *,
        rows: bool = True,
    ) -> None:
        self.skill = skill
        self.arguments = dict(arguments)
        self.asks = dict(asks)
        self._model = model
        for name in self.asks:
            if name in _TAKEN:
                raise RequestError(
                    f"'--ask {name}=...': lines say something else by that name: choose another"
                )
        filled = [self.arguments.get(name, "") for name in _FILLED] + list(self.asks.values())
        self._varies = rows and any(map(_COLUMN.search, filled))
        self.varying = [name for name in _FILLED if self._differs(self.arguments.get(name, ""))]
        """The arguments that differ from picture to picture."""
        self.general = self._fill(lambda text: None if self._differs(text) else text)
        """What is asked about all pictures alike."""

    def of(self, found: Found) -> dict[str, Any]:
        """Return what is asked about a picture; RequestError where its row lacks a column."""
        if not self._varies:
            return self.general
        row = found.row or {}

        def value(match: re.Match[str]) -> str:
            if match[1] in row:
                return _text(row[match[1]], found, match[1])
            if not _MUST_BE_COLUMN.fullmatch(match[0]):
                return match[0]
            lack = "no table gives it a" if found.row is None else "its row has no"
            raise RequestError(f"{found.name!r}: {lack} column {match[1]!r}{odd_header(row)}")

        return self._fill(lambda text: _COLUMN.sub(value, text))

    def _differs(self, text: str) -> bool:
        return self._varies and _COLUMN.search(text) is not None

    def _fill(self, fill: Callable[[str], str | None]) -> dict[str, Any]:
        asked: dict[str, Any] = {"skill": self.skill, "model": self._model, **self.arguments}
        for name in _FILLED:
            if name in asked:
                asked[name] = fill(asked[name])
        if self.asks:
            asked["asks"] = {name: fill(text) for name, text in self.asks.items()}
        return {name: value for name, value in asked.items() if value is not None}


def _text(value: Any, found: Found, column: str) -> str:
    """Return a value of a row for a question; RequestError where it can't be sent."""
    where = found.place or repr(found.name)
    if value is None:
        raise RequestError(f"{where} has nothing in column {column!r}")
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else str(value)
    if whole(text) != text:
        raise RequestError(f"{where} has no UTF-8 in column {column!r}: save it as UTF-8")
    return text


def may_have_rows(paths: Sequence[str], lists: Sequence[str]) -> bool:
    """Tell whether a table or a shard is named, or may be: by a list, or by a pattern."""
    return bool(lists) or any(
        each == "-"
        or is_table(each)
        or is_shard(each)
        or (has_magic(each) and not can_prepare(each))
        for each in paths
    )


def find_column(texts: Sequence[str]) -> str | None:
    """Return the first ``{column}`` in questions or objects; other braces are text."""
    return next((found[0] for text in texts if (found := _MUST_BE_COLUMN.search(text))), None)


# -- a picture that is being asked about -----------------------------------------------------------


class Pending:
    """A picture whose questions are not all answered: a file that the client reads.

    It is `asked` what its line will say; an earlier run may have got some of the answers.
    """

    def __init__(
        self, found: Found, asked: Mapping[str, Any], answers: Mapping[str, str] | None = None
    ) -> None:
        self.found = found
        self.asked = asked
        self.name = found.path
        self.contents: Contents | None = None
        """None until the picture was read."""
        self.tries = 0
        self.seconds = 0.0
        self._fields: dict[str, Any] = dict(answers or {})
        self._left = [name for name in asked.get("asks", ()) if name not in self._fields]
        self._tokens: Counter[str] = Counter()

    def read(self, _size: int = -1) -> bytes:
        """Return all of the file at the first call, and nothing at the next."""
        if self.contents is not None:
            return b""
        if self.found.data is not None:
            data, self.contents = self.found.data, self.found.contents
        else:
            data, self.contents = read(self.name)
        return data

    def items(self, image: Any = None) -> list[BulkItem]:
        """Return a request for each question that is left; `image` is the prepared picture."""
        image = image or self
        if not self._left:
            own = {name: self.asked.get(name) for name in ("question", "object")}
            return [BulkItem(image=image, id=(self, None), **own)]
        asks = self.asked["asks"]
        return [BulkItem(image=image, id=(self, name), question=asks[name]) for name in self._left]

    def take(self, name: str | None, result: BulkResult[Any, Any]) -> Outcome | None:
        """Take the result of a question; return the whole outcome once it was the last one."""
        outcome: Any = result.error or result.result
        self.tries += result.tries
        self.seconds = max(self.seconds, result.seconds)
        if name is None:
            return outcome  # type: ignore[no-any-return]
        fields = fields_of(outcome)
        if "answer" in fields:
            self._fields[name] = fields["answer"]
        if "error" in fields:
            self._fields.setdefault("error", fields["error"])
        for count, value in (fields.get("metrics") or {}).items():
            if count in ("input_tokens", "output_tokens") and isinstance(value, int):
                self._tokens[count] += value
        self._left.remove(name)
        return None if self._left else {**self._fields, "metrics": self._tokens}


async def prepared(
    client: MoondreamClient, pendings: AsyncIterator[Pending]
) -> AsyncGenerator[tuple[Pending, Awaitable[EncodedImage]], None]:
    """Prepare each picture once for all its questions, and some of the next ones ahead."""
    ahead: deque[tuple[Pending, asyncio.Task[EncodedImage]]] = deque()
    try:
        async for pending in pendings:
            image = client.encode_image(pending)  # type: ignore[arg-type]
            ahead.append((pending, asyncio.ensure_future(image)))
            if len(ahead) == _AHEAD:
                yield ahead.popleft()
        while ahead:
            yield ahead.popleft()
    finally:
        for _, task in ahead:
            task.cancel()
        await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)
