"""What ``bulk`` does: finds pictures, has them asked about, and keeps what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from moondream_async.cli._output import note
from moondream_async.errors import MoondreamError, RequestError
from moondream_async.results import Result

from .exports import TextFolder, write_parquet
from .journal import Journal
from .progress import BATCH_DISCOUNT, Progress
from .report import write_report
from .sources import Contents, Found, PictureFile, find, lines

if TYPE_CHECKING:
    from moondream_async import MoondreamClient

    from .command import Output

_CHUNK = 64  # files that are looked up in one go of a thread
_BETWEEN_SHOWS = 0.2  # seconds
_READ_BYTES = 1 << 16
_STDIN = 0  # by its number, since sys.stdin is None where it is closed


class Job:
    """One run of the command.

    Attributes:
        interrupted: Whether Ctrl-C ended it.
        failed: How many pictures failed.
    """

    def __init__(
        self,
        client: MoondreamClient,
        skill: str,
        arguments: Mapping[str, Any],
        *,
        model: str | None,
        output: Output,
        report: str | None,
    ) -> None:
        self.client = client
        self.skill = skill
        self.arguments = arguments
        self.interrupted = False
        self.journal: Journal
        self.progress: Progress
        self._output = output
        self._report = report
        self._asked = {"skill": skill, "model": model, **arguments}
        self._texts = TextFolder(output.path) if output.form == "folder" else None
        self._arguments: list[str] = []
        self._lists: list[str] = []
        self._seen: set[int] | None = None
        self._scope: anyio.CancelScope  # around the asking; made in the loop
        self._stop: Callable[[], None]
        self._grace = 0.0

    @property
    def failed(self) -> int:
        """How many pictures failed."""
        return self.progress.failed

    def sources(self, arguments: list[str], lists: list[str]) -> None:
        """Name where the pictures are."""
        self._arguments, self._lists = arguments, lists
        if len(arguments) + len(lists) > 1 or lists or "-" in arguments:
            self._seen = set()  # of hashes: one folder holds no file twice

    async def run(self, grace: float, *, by_batch: bool) -> None:
        """Do it, and print what came of it.

        Raises:
            MoondreamError: It can't go on; what is done is kept.
        """
        self._grace = grace
        self._scope = anyio.CancelScope()
        self._stop = self._scope.cancel
        folder = Path(self._output.journal).parent
        with _told("create", str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        with _told("open", self._output.journal):
            self.journal = Journal(self._output.journal, self._asked)
        failure: Exception | None = None
        price = BATCH_DISCOUNT if by_batch else 1.0
        with self.journal, Progress(price=price) as self.progress:
            async with self.client, anyio.create_task_group() as group:
                group.start_soon(self._show)
                group.start_soon(self._count)
                try:
                    with self._interruptible(), self._scope:
                        await (self._by_batch() if by_batch else self._by_requests())
                except Exception as error:  # noqa: BLE001 - raised again, and not in a group
                    failure = error
                group.cancel_scope.cancel()
            if failure is not None:
                raise failure
            with _told("write", self._output.journal):
                self.journal.compact()
            if not self.interrupted:
                await self._finish()
        note(self.progress.summary())

    async def items(self) -> AsyncIterator[PictureFile]:
        """Yield what is to be asked about, and count what needs no asking."""
        async for chunk in self._chunks():
            states = await anyio.to_thread.run_sync(self._look_up, chunk, abandon_on_cancel=True)
            for found, state in zip(chunk, states, strict=True):
                if isinstance(state, MoondreamError):
                    self.keep(found, None, state)
                elif state:
                    self.progress.skipped += 1
                elif state is False:
                    yield PictureFile(found)

    def keep(
        self,
        found: Found,
        contents: Contents | None,
        outcome: Result | MoondreamError | Mapping[str, Any],
        *,
        tries: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Write and count what became of a picture.

        Raises:
            MoondreamError: It can't be written.
        """
        metrics = None
        if isinstance(outcome, Result):
            metrics = outcome.metrics
            if self._texts is not None:
                with _told("write", str(self._texts.path(found))):
                    self._texts.write(found, outcome)
        with _told("write", self.journal.path):
            self.journal.append(found, contents, outcome, tries=tries, seconds=seconds)
        self.progress.count(metrics, failed=not isinstance(outcome, Result))

    # -- the ways to ask ----------------------------------------------------------------

    async def _by_requests(self) -> None:
        options = {name: value for name, value in self.arguments.items() if name != "model"}
        async with self.client.bulk(self.items(), self.skill, **options) as run:
            self._stop = run.stop
            async for each in run:
                outcome = each.error or each.result
                if outcome is not None:
                    self.keep(
                        each.item.found,
                        each.item.contents,
                        outcome,
                        tries=each.tries,
                        seconds=each.seconds,
                    )

    async def _by_batch(self) -> None:
        from .by_batch import ask_by_batch  # noqa: PLC0415 - seldom used

        await ask_by_batch(self)

    async def _finish(self) -> None:
        path, form = self._output
        if form == "parquet":
            with _told("write", path):
                await anyio.to_thread.run_sync(write_parquet, self.journal.records(), path)
        if self._report is not None:
            with _told("write", self._report):
                await anyio.to_thread.run_sync(write_report, self.journal.records, self._report)

    # -- where the pictures are ---------------------------------------------------------

    def _find(self) -> Iterator[Found]:
        """Yield what the arguments and the lists mean, stdin left out. It blocks."""
        yield from find(each for each in self._arguments if each != "-")
        for name in self._lists:
            with Path(name).open("rb") as file:
                yield from find(lines(iter(partial(file.read, _READ_BYTES), b"")))

    async def _chunks(self) -> AsyncIterator[list[Found]]:
        found = self._find()
        take = partial(_take, found)
        while chunk := await anyio.to_thread.run_sync(take, abandon_on_cancel=True):
            yield chunk
        if "-" in self._arguments:
            rest: list[bytes] = []
            while piece := await _read_stdin():
                head, end, tail = piece.rpartition(b"\n")
                if end:
                    for chunk in _in_chunks(find(lines([*rest, head]))):
                        yield chunk
                    rest = []
                rest.append(tail)
            for chunk in _in_chunks(find(lines(rest))):
                yield chunk

    def _look_up(self, chunk: list[Found]) -> list[bool | MoondreamError | None]:
        """Tell of each file whether it is done, or can't be; None for one that was there before."""
        return [self._state(found) for found in chunk]

    def _state(self, found: Found) -> bool | MoondreamError | None:
        if self._seen is not None:
            if hash(found.path) in self._seen:
                return None
            self._seen.add(hash(found.path))
        try:
            if self._texts is not None:
                self._texts.claim(found)
                if not self._texts.path(found).exists():
                    return False
        except RequestError as error:
            return error
        return self.journal.has(found)

    async def _count(self) -> None:
        """Find how many pictures there are, beside the work, where that can be known."""
        if "-" in self._arguments:
            return
        found, total = self._find(), 0
        with contextlib.suppress(OSError):  # whoever asks about them meets it, too
            while chunk := await anyio.to_thread.run_sync(
                partial(_take, found, 1000), abandon_on_cancel=True
            ):
                total += len(chunk)
            self.progress.total = total

    # -- while it goes on ---------------------------------------------------------------

    async def _show(self) -> None:
        while True:
            self.progress.show()
            await anyio.sleep(_BETWEEN_SHOWS)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end it well, and the second at once."""
        loop = asyncio.get_running_loop()
        try:
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        except (NotImplementedError, ValueError):  # Windows; then Ctrl-C cancels all
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _interrupt(self) -> None:
        if self.interrupted:
            self._scope.cancel()
            return
        self.interrupted = True
        self._scope.deadline = asyncio.get_running_loop().time() + self._grace
        note(f"Finishing what is under way, for {self._grace:g} seconds at most; Ctrl-C: stop now.")
        self._stop()


def _take(found: Iterator[Found], count: int = _CHUNK) -> list[Found]:
    return list(islice(found, count))


def _in_chunks(found: Iterable[Found]) -> Iterator[list[Found]]:
    iterator = iter(found)
    while chunk := _take(iterator):
        yield chunk


async def _read_stdin() -> bytes:
    # Not in a thread, where a read that waits could not be ended. A file needs no waiting,
    # and can't be waited for.
    with contextlib.suppress(OSError, NotImplementedError):
        await anyio.wait_readable(_STDIN)
    return os.read(_STDIN, _READ_BYTES)


@contextlib.contextmanager
def _told(act: str, path: str) -> Iterator[None]:
    """Say which file it was that failed."""
    try:
        yield
    except OSError as error:
        raise MoondreamError(f"Can't {act} {path}: {error.strerror or error}") from error
