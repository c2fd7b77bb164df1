"""A watch: the newest frame waits, and is asked about as soon as a reader waits for a result.

One task reads frames all the time; a new frame supersedes the one that waits. A task for each
question runs in the first task's group. `_Work.advance` decides after every change, without an
await, whether a question starts. The question's frame is chosen only when the question has its
connection slot: a frame chosen earlier would age while it waits for the slot.

As in a bulk run, the reader and the tasks share `_Work`, which holds no reference to the
`Watch`: a reader who drops the `Watch`, as with a plain ``break``, ends the tasks.

A frame that failed is not tried again, since there is a newer one. But after a failure there
is a pause before the next question, longer with each failure in a row.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import anyio

from moondream_async._call.report import drop_frames
from moondream_async._call.retry import backoff
from moondream_async._stream.stream import Stream
from moondream_async.bulk.results import Bell, Results
from moondream_async.errors import (
    APIStatusError,
    AuthenticationError,
    ClientClosedError,
    MoondreamError,
    RequestError,
)

from .blocking import BlockingFrames
from .items import AnswerT, Frames, FrameT, WatchResult

if TYPE_CHECKING:
    from .asking import Question

_LEAST_INTERVAL = 0.002
"""The least seconds from a waiting frame to the reading of the next: an iterable that is always
ready would otherwise take all of the processor. No camera is faster."""
_LONGEST_PAUSE = 5.0
"""The most seconds between two questions after failures, unless the server asks for more."""


class Watch(Results[WatchResult[FrameT, AnswerT]], Generic[FrameT, AnswerT]):
    """The answers about moving pictures, as an iterator; see `MoondreamClient.watch`.

    The watch ends by leaving ``async with``, by `aclose`, or when it is dropped, as with
    ``break``: questions under way are cancelled, their connections are closed, and a thread
    that reads frames ends. Inside ``async with``, cancelling a reader loses no result;
    elsewhere it ends the watch.

    >>> async def main():
    ...     async with md.MoondreamClient() as client:
    ...         watch = client.watch([md.SAMPLE_IMAGE])
    ...         async with watch:
    ...             async for each in watch:
    ...                 print(each.ok, watch.frames, watch.skipped)
    ...             await watch.aclose()  # which leaving does
    >>> asyncio.run(main())
    True 1 0
    """

    _work: _Work

    def __init__(
        self,
        question: Question,
        frames: Frames[FrameT],
        *,
        in_flight: int,
        max_age: float | None,
        raises: bool,
        supersede: bool,
    ) -> None:
        work = _Work(question, frames, in_flight=in_flight, max_age=max_age, supersede=supersede)
        super().__init__(work, "watch")
        self._raises = raises

    @property
    def in_flight(self) -> int:
        """How many frames are being asked about."""
        return len(self._work.under_way)

    @property
    def frames(self) -> int:
        """How many frames the iterable gave."""
        return self._work.frames

    @property
    def skipped(self) -> int:
        """How many frames were superseded before there was an answer."""
        return self._work.skipped

    @property
    def dropped(self) -> int:
        """How many answers came too late: after a newer frame's, or over `max_age`."""
        return self._work.dropped

    async def __anext__(self) -> WatchResult[FrameT, AnswerT]:
        """Return the next result. The stream of the result before is closed.

        After an exception the watch has ended.

        Raises:
            AuthenticationError: The server knows no such key.
            ClientClosedError: The client was closed.
            MoondreamError: A frame failed, with ``on_error="raise"``.
            Exception: The iterable's own, after the results of the frames before.
        """
        result = await super().__anext__()
        if self._raises and result.error is not None:
            await self.aclose()
            raise result.error
        return result


class _Taken(NamedTuple):
    """A frame as the iterable gave it."""

    frame: Any
    place: int  # the number of the frame, from 0
    taken_at: float  # seconds since 1970
    at: float  # by the monotonic clock


class _Shot:
    """A question about a frame, from before the frame is chosen to the result."""

    __slots__ = ("answer", "error", "scope", "superseded", "taken")

    def __init__(self) -> None:
        self.taken: _Taken | None = None  # until there is a connection slot
        self.scope: anyio.CancelScope | None = None  # while it is under way
        self.superseded = False
        self.answer: Any = None
        self.error: MoondreamError | None = None

    @property
    def chosen(self) -> _Taken:
        """The frame of a question that has a result."""
        assert self.taken is not None  # noqa: S101 - for the type checker
        return self.taken

    def supersede(self) -> None:
        """Cancel the question."""
        self.superseded = True
        if self.scope is not None:
            self.scope.cancel()


class _Work:
    """The state of a watch, and what its tasks do."""

    def __init__(
        self,
        question: Question,
        frames: Frames[Any],
        *,
        in_flight: int,
        max_age: float | None,
        supersede: bool,
    ) -> None:
        self.frames = 0
        self.skipped = 0
        self.dropped = 0
        self.under_way: list[_Shot] = []  # in the order of their frames, as `_done`
        self.closed = False
        self._question = question
        self._source = frames
        self._in_flight = in_flight
        self._max_age = max_age
        self._supersede = supersede
        self._latest: _Taken | None = None
        self._done: list[_Shot] = []
        self._given = -1  # the number of the last result's frame
        self._stream: Stream | None = None  # the last result's, which may be being read
        self._readers = 0
        self._failures = 0  # in a row
        self._paused = False
        self._paused_until = 0.0
        self._group: anyio.abc.TaskGroup | None = None
        self._failure: BaseException | None = None
        self._ended = False
        self._changed = Bell()

    # -- the reader's side ----------------------------------------------------------

    async def next(self) -> WatchResult[Any, Any]:
        """Return the next result, or raise the error that ended the watch; it is raised once."""
        self._readers += 1
        try:
            self._dismiss_stream()
            self.advance()
            shot = None
            while shot is None:
                await self._changed.until(lambda: bool(self._done) or self._ended or self.closed)
                if self.closed or not self._done:
                    failure, self._failure = self._failure, None
                    raise StopAsyncIteration if failure is None or self.closed else failure
                shot = self._take()
        finally:
            self._readers -= 1
        if isinstance(shot.answer, Stream):
            self._stream = shot.answer
        frame, index, taken_at, at = shot.chosen
        skipped, self._given = index - self._given - 1, index
        return WatchResult(
            frame=frame,
            index=index,
            result=shot.answer,
            error=shot.error,
            taken_at=taken_at,
            age=time.monotonic() - at,
            skipped=skipped,
        )

    def _take(self) -> _Shot | None:
        """Take the first question that is done; None if its frame is too old."""
        shot = self._done.pop(0)
        if self._max_age is not None and time.monotonic() - shot.chosen.at > self._max_age:
            self._drop(shot)
            self.advance()
            return None
        return shot

    def close(self) -> None:
        """Close the answers that no reader has taken, and take no more."""
        self.closed = True
        self._latest = None
        self._dismiss_stream()
        for shot in self._done:
            _close_answer(shot)
        self._done.clear()
        self._changed.ring()

    # -- the watch's side -----------------------------------------------------------

    async def run(self) -> None:
        """Read all frames, and ask about the newest, again and again."""
        try:
            # Before the first frame, which would age meanwhile; and once, since threads that
            # need it at the same time would find it half loaded.
            await asyncio.to_thread(_load_encoder)
            async with anyio.create_task_group() as self._group:
                try:
                    await self._read()
                except Exception as error:  # noqa: BLE001 - reported to the reader
                    self._failure = error
                await self._changed.until(lambda: self._latest is None and not self.under_way)
                self._group.cancel_scope.cancel()  # a pause, if any
        finally:
            self._ended = True
            self._group = None
            self._changed.ring()

    async def _read(self) -> None:
        async with _reading(self._source) as following:
            async for frame in following:
                self._offer(_Taken(frame, self.frames, time.time(), time.monotonic()))
                del frame  # else it is kept while this task waits for the next one
                await anyio.sleep(0 if self._latest is None else _LEAST_INTERVAL)

    def _offer(self, taken: _Taken) -> None:
        """Let a frame supersede the one that waits."""
        self.frames += 1
        self.skipped += self._latest is not None
        self._latest = taken
        if self._supersede:
            self._dismiss_stream()
        self.advance()

    def advance(self) -> None:
        """Start a question about the newest frame, if a reader waits and a question may start.

        At most one question waits for a connection slot; its frame is chosen with the slot.
        """
        if self._latest is None or self._group is None or not self._readers or self._paused:
            return
        if self._group.cancel_scope.cancel_called:
            return  # a closed client refuses at once: the next question would, and so for ever
        if self.under_way and self.under_way[-1].taken is None:
            return
        if len(self.under_way) + len(self._done) >= self._in_flight:
            if not (self._supersede and self.under_way):
                return
            self.under_way.pop(0).supersede()
            self.skipped += 1
        shot = _Shot()
        self.under_way.append(shot)
        self._group.start_soon(self._ask, shot)

    def _choose(self, shot: _Shot) -> Any:
        """Take the newest frame, for a question that has its connection slot."""
        if self._latest is None:
            raise ClientClosedError("The watch has ended")
        shot.taken, self._latest = self._latest, None
        self._changed.ring()
        return shot.taken.frame

    async def _ask(self, shot: _Shot) -> None:
        try:
            with anyio.CancelScope() as shot.scope:
                shot.answer = await self._question.ask(partial(self._choose, shot))
        except (AuthenticationError, ClientClosedError) as fatal:
            self._fail(fatal)  # every other frame would fail, too
        except MoondreamError as failure:
            shot.error = failure
        except Exception as bug:  # noqa: BLE001 - reported to the reader
            self._fail(bug)
        finally:
            shot.scope = None
            if shot in self.under_way:
                self.under_way.remove(shot)
        self._keep(shot)
        self.advance()
        self._changed.ring()

    def _keep(self, shot: _Shot) -> None:
        """Keep a result for the reader, unless it comes too late."""
        if shot.superseded or self.closed:
            _close_answer(shot)
        elif shot.answer is not None or shot.error is not None:
            self._pause_after(shot.error)
            if shot.taken is None:  # the question failed before it had a slot
                self._choose(shot)
            if shot.chosen.place < self._given:
                self._drop(shot)
            else:
                bisect.insort(self._done, shot, key=lambda each: each.chosen.place)

    def _pause_after(self, error: MoondreamError | None) -> None:
        """Ask nothing for a while after a failure of the server or the network."""
        if error is None:
            self._failures = 0
            return
        drop_frames(error)
        if isinstance(error, RequestError):
            return
        retry_after = error.retry_after if isinstance(error, APIStatusError) else None
        delay = backoff(self._failures, random.random(), retry_after)  # noqa: S311 - no secret
        self._failures += 1
        longest = _LONGEST_PAUSE if retry_after is None else delay
        until = time.monotonic() + min(delay, longest)
        self._paused_until = max(self._paused_until, until)
        if not self._paused and self._group is not None:
            self._paused = True
            self._group.start_soon(self._wait_out)

    async def _wait_out(self) -> None:
        while (left := self._paused_until - time.monotonic()) > 0:  # noqa: ASYNC110 - it may grow
            await anyio.sleep(left)
        self._paused = False
        self.advance()

    def _fail(self, error: BaseException) -> None:
        """End the watch, and leave the error for the reader."""
        if self._failure is None:
            self._failure = error
        if self._group is not None:
            self._group.cancel_scope.cancel()

    def _drop(self, shot: _Shot) -> None:
        self.dropped += 1
        _close_answer(shot)

    def _dismiss_stream(self) -> None:
        """Close the last result's stream; a new frame or its reader has superseded it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.supersede()


def _load_encoder() -> None:
    from PIL import Image  # noqa: PLC0415 - most programs do without

    import_module("moondream_async._images.convert")
    Image.preinit()


@contextlib.asynccontextmanager
async def _reading(frames: Frames[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    """Read an iterable, asynchronous or not; it belongs to the caller, and is not closed."""
    if isinstance(frames, AsyncIterable):
        yield aiter(frames)
        return
    following = BlockingFrames(frames)
    try:
        yield following
    finally:
        following.close()


def _close_answer(shot: _Shot) -> None:
    if isinstance(shot.answer, Stream):
        shot.answer.supersede()


def check_frames(frames: Any) -> None:
    """Refuse, by a RequestError, a single picture, and what can't be iterated over."""
    shape = getattr(frames, "shape", (0, 0, 0, 0))
    one = isinstance(frames, (str, bytes, bytearray, memoryview, dict)) or len(shape) < 4
    if one or not isinstance(frames, (Iterable, AsyncIterable)):
        raise RequestError(f"frames must be an iterable of pictures, not {frames!r:.100}")
