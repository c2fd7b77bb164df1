"""A picture that is being asked about: its questions, and the answers so far."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from moondream_async.bulk import BulkItem, BulkResult
from moondream_async.errors import ImageError

from .lines import Outcome, fields_of
from .sources import Found, PictureFile

if TYPE_CHECKING:
    from moondream_async import EncodedImage, MoondreamClient

_AHEAD = 8  # pictures that are prepared before they are asked about


class Pending:
    """A picture whose questions are not all answered.

    Args:
        found: The picture.
        asked: The skill and its arguments, as they stand in the picture's line.
        answers: Answers of an earlier run, by the names of the questions.
    """

    def __init__(self, found: Found, asked: Mapping[str, Any], answers: dict[str, str]) -> None:
        self.found = found
        self.asked = asked
        self.file = PictureFile(found)
        self.tries = 0
        self.seconds = 0.0
        self._fields: dict[str, Any] = dict(answers)
        self._left = [name for name in asked.get("asks", ()) if name not in answers]
        self._tokens: dict[str, int] = {}

    def items(self, image: Any) -> list[BulkItem]:
        """Return a request for each question that is left."""
        if not self._left:
            own = {name: self.asked.get(name) for name in ("question", "object")}
            return [BulkItem(image=image, id=(self, None), **own)]
        asks = self.asked["asks"]
        return [BulkItem(image=image, id=(self, name), question=asks[name]) for name in self._left]

    def take(self, name: str | None, result: BulkResult[Any, Any]) -> Outcome | None:
        """Take the result of a question; return the whole outcome once it was the last one."""
        outcome: Any = result.error or result.result
        self.tries += result.tries
        if name is None:
            self.seconds = result.seconds
            return outcome  # type: ignore[no-any-return]
        self.seconds = max(self.seconds, result.seconds)
        fields = fields_of(outcome)
        if "answer" in fields:
            self._fields[name] = fields["answer"]
        for count, value in (fields.get("metrics") or {}).items():
            if count in ("input_tokens", "output_tokens") and isinstance(value, int):
                self._tokens[count] = self._tokens.get(count, 0) + value
        if "error" in fields:
            self._fields.setdefault("error", fields["error"])
        self._left.remove(name)
        return None if self._left else {**self._fields, "metrics": self._tokens}


async def prepared(
    client: MoondreamClient, pendings: AsyncIterator[Pending]
) -> AsyncGenerator[tuple[Pending, EncodedImage | ImageError], None]:
    """Prepare each picture once for all its questions, and some of the next ones ahead."""
    ahead: deque[tuple[Pending, asyncio.Task[EncodedImage | ImageError]]] = deque()
    try:
        async for pending in pendings:
            task = asyncio.ensure_future(_prepare(client, pending))
            ahead.append((pending, task))
            if len(ahead) >= _AHEAD:
                first, task = ahead.popleft()
                yield first, await task
        while ahead:
            first, task = ahead.popleft()
            yield first, await task
    finally:
        for _, task in ahead:
            task.cancel()
        await asyncio.gather(*(task for _, task in ahead), return_exceptions=True)


async def _prepare(client: MoondreamClient, pending: Pending) -> EncodedImage | ImageError:
    try:
        return await client.encode_image(pending.file)  # type: ignore[arg-type]
    except ImageError as error:
        return error
