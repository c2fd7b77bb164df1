"""One run of ``bulk``: find pictures, ask about them, and write the answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import msgspec

from moondream_async.bulk import BulkItem
from moondream_async.cli._output import note, print_json
from moondream_async.errors import APIConnectionError, ImageError, MoondreamError, RequestError

from .by_batch import ask_by_batch
from .exports import WRITERS, Output
from .journal import Journal
from .lines import Outcome, fields_of, text_of
from .progress import BATCH_DISCOUNT, CLOUD_RATE, Estimate, Progress
from .questions import Pending, Questions, prepared
from .report import write_report
from .search import Search, explained
from .sources import Found, name_of
from .texts import TextFolder, write_classes

if TYPE_CHECKING:
    from moondream_async import MoondreamClient

_State = Pending | MoondreamError | Literal[True] | None

# So many failures in a row to reach the server end a run: before its first answer, and after.
_AWAY_FIRST, _AWAY_LATER = 3, 30
_BETWEEN_SHOWS = 0.2  # seconds
_NAMED = 5  # files or endings that a line of the summary names


class Job:
    """One run of the command.

    The client is closed at its end. Options that it does not know are for `Search`.
    """

    def __init__(
        self,
        client: MoondreamClient,
        questions: Questions,
        output: Output,
        paths: list[str],
        lists: list[str],
        *,
        report: str | None,
        overwrite: bool,
        limit: int | None,
        **options: Any,
    ) -> None:
        self.client = client
        self.questions = questions
        self.interrupted = False
        """Whether Ctrl-C ended the run."""
        self.journal: Journal
        self.progress: Progress
        self.not_again: set[str] = set()
        """Names of pictures that failed before they were looked up."""
        self._output = output
        self._report = report
        self._limit = limit
        folder = output.form == "folder"
        self._labels = folder and questions.skill == "detect"
        self._texts = (
            TextFolder(output.path, labels=self._labels, overwrite=overwrite) if folder else None
        )
        self._search = Search(paths, lists, self._found_fault, is_own=self._is_own, **options)
        self._seen: set[int] | None = set() if self._search.may_repeat else None  # hashes
        self._said: set[str] = set()
        self._faults = 0  # arguments that gave no pictures
        self._away = 0  # pictures in a row for which no server could be reached
        self._scope: anyio.CancelScope  # around the asking; made in the loop
        self._stop: Callable[[], None]
        self._grace = 0.0

    @property
    def failed(self) -> bool:
        """Whether a picture failed, or an argument gave none."""
        return bool(self.progress.failed or self._faults)

    @property
    def _is_cloud(self) -> bool:
        """Whether the server takes dollars."""
        return (urlsplit(self.client.endpoint).hostname or "").endswith("moondream.ai")

    async def run(self, grace: float, *, by_batch: bool) -> None:
        """Ask about all pictures and print a summary; a MoondreamError ends the run early.

        What was answered until then is kept, and the next run goes on from there.
        """
        self._grace = grace
        self._scope = anyio.CancelScope()
        self._stop = self._scope.cancel
        with contextlib.ExitStack() as stack:
            self.journal = self._open(stack)
            price = (BATCH_DISCOUNT if by_batch else 1.0) if self._is_cloud else None
            self.progress = stack.enter_context(Progress(price=price))
            await self._ask(partial(ask_by_batch, self) if by_batch else self._by_requests)
            with explained("write", self.journal.path):
                self.journal.compact()
            if not self.interrupted:
                await self._finish()
        for line in self.progress.summary():
            note(line)
        self._note_other_files()

    async def dry_run(self, rate: float | None, *, by_batch: bool) -> list[str]:
        """Return what a run would take, in lines; the server is not asked, and no file written."""
        estimate = Estimate(self.questions)
        with contextlib.ExitStack() as stack:
            self.journal = self._open(stack, new=False)
            self.progress = Progress(price=None)
            async with self.client:
                await anyio.to_thread.run_sync(estimate.learn, self.journal.records())
                async for pending in self.items(refuse=estimate.refuse):
                    await anyio.to_thread.run_sync(estimate.add, pending)
        estimate.done = self.progress.skipped
        rate = rate or (CLOUD_RATE if self._is_cloud else None)
        return estimate.describe(rate, by_batch=by_batch)

    async def items(
        self, refuse: Callable[[Found, MoondreamError], object] | None = None
    ) -> AsyncGenerator[Pending, None]:
        """Yield the pictures to ask about; count those that are done or refused."""
        refuse = refuse or (
            lambda found, error: self.keep(Pending(found, self.questions.general), error)
        )
        given = 0
        async with contextlib.aclosing(self._search.chunks()) as chunks:
            async for chunk in chunks:
                states = await anyio.to_thread.run_sync(
                    list, map(self._state, chunk), abandon_on_cancel=True
                )
                for found, state in zip(chunk, states, strict=True):
                    if isinstance(state, MoondreamError):
                        refuse(found, state)
                    elif state is True:
                        self.progress.skipped += 1
                    elif state is not None:
                        if given == self._limit:
                            return
                        given += 1
                        yield state

    def keep(self, pending: Pending, outcome: Outcome, *, usage: Any = None) -> None:
        """Write and count what became of a picture."""
        found, fields = pending.found, fields_of(outcome)
        if usage is not None and not fields.get("metrics"):
            fields["metrics"] = dict(usage)
        where = "stdout" if self._output.form == "stdout" else self.journal.path
        with explained("write", where):
            self.journal.append(pending, fields)
        if self._texts is not None and "error" not in fields:
            # After the line: a text without a line would pass for one that a user wrote.
            try:
                with explained("write", str(self._texts.path(found))):
                    self._texts.write(found, text_of(fields) or "", self.journal)
            except RequestError as error:
                fields = fields_of(error)
                with explained("write", where):
                    self.journal.append(pending, fields)
        self.progress.count(fields.get("metrics"), fields.get("error"))

    # -- the ways to ask ----------------------------------------------------------------

    async def _ask(self, way: Callable[[], Any]) -> None:
        failure: Exception | None = None
        async with self.client, anyio.create_task_group() as group:
            group.start_soon(self._show)
            group.start_soon(self._count)
            try:
                with self._interruptible(), self._scope:
                    await way()
            except Exception as error:  # noqa: BLE001 - raised again, and not in a group
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _by_requests(self) -> None:
        own = ("question", "object")  # of each item
        options = {k: v for k, v in self.questions.arguments.items() if k not in own}
        async with (
            contextlib.aclosing(self._bulk_items()) as items,
            self.client.bulk(items, self.questions.skill, **options) as run,
        ):
            self._stop = run.stop
            async for each in run:
                pending, name = each.item.id
                outcome = pending.take(name, each)
                if outcome is not None:
                    self.keep(pending, outcome)
                self._check_reachable(each.error)

    async def _bulk_items(self) -> AsyncGenerator[BulkItem, None]:
        async with contextlib.aclosing(self.items()) as pendings:
            if not self.questions.asks:
                async for pending in pendings:
                    for item in pending.items():
                        yield item
                return
            async with contextlib.aclosing(prepared(self.client, pendings)) as pictures:
                async for pending, image in pictures:
                    try:
                        items = pending.items(await image)
                    except ImageError as error:
                        self.keep(pending, error)
                        continue
                    for item in items:
                        yield item

    def _check_reachable(self, error: MoondreamError | None) -> None:
        """End the run by an error after many failures in a row to reach the server."""
        if error is None:
            self._away = 0
        elif isinstance(error, APIConnectionError):
            self._away += 1
            if self._away >= (_AWAY_LATER if self.progress.answered else _AWAY_FIRST):
                raise MoondreamError(
                    f"Stopped after {self._away} failures in a row: {error}. What is done is "
                    "kept; run again to go on"
                )

    # -- what is written ------------------------------------------------------------------

    def _open(self, stack: contextlib.ExitStack, *, new: bool = True) -> Journal:
        path = self._output.journal
        stdout = self._output.form == "stdout"
        if stdout or not (new or Path(path).exists()):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="moondream-"))
            path = f"{folder}/lines.jsonl"
        with explained("create", str(Path(path).parent)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with explained("open", path):
            return stack.enter_context(
                Journal(
                    path,
                    self.questions.general,
                    complain=self._say_once,
                    on_line=_print_line if stdout else lambda _: None,
                    with_texts=self._texts is not None,
                    varying=self.questions.varying,
                )
            )

    async def _finish(self) -> None:
        """Make the files that are made of the journal."""
        path, form = self._output
        if self._labels:
            with explained("write", f"{path}data.yaml"):
                write_classes(path, [self.questions.arguments["object"]])
        files = {path: WRITERS.get(form), self._report: write_report}
        for name, write in files.items():
            if name is not None and write is not None:
                with explained("write", name):
                    await anyio.to_thread.run_sync(write, self.journal.records, name)

    def _is_own(self, path: str) -> bool:
        own = self._report is not None and Path(self._report).absolute() == Path(path).absolute()
        return own or self._output.owns(path)

    # -- what needs asking ------------------------------------------------------------------

    def _state(self, found: Found) -> _State:
        """Return a picture to ask about; True if it is done, None if it is left out."""
        if found.name in self.not_again:
            return None
        if found.fault is not None:
            return RequestError(found.fault)
        try:
            asked = self.questions.of(found)
            if self._seen is not None:
                key = hash((found.path, str(asked)))
                if key in self._seen:
                    return None
                self._seen.add(key)
            written = self._texts.claim(found, self.journal) if self._texts is not None else True
        except RequestError as error:
            return error
        if written is None or (written and self.journal.has(found, asked)):
            return written
        return Pending(found, asked, self.journal.answers(found, asked))

    async def _count(self) -> None:
        """Count all pictures, while others are asked about."""
        if self._limit is None:
            self.progress.total = await self._search.count()

    # -- what is printed ---------------------------------------------------------------------

    async def _show(self) -> None:
        while True:
            self.progress.show()
            await anyio.sleep(_BETWEEN_SHOWS)

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            note(what[:1].upper() + what[1:])

    def _found_fault(self, what: str) -> None:
        self._faults += 1
        self._say_once(what)

    def _note_other_files(self) -> None:
        if self._texts is not None and self._texts.kept:
            kept = [name_of(str(each)) for each in self._texts.kept]
            note(
                f"{len(kept):,} texts that people wrote or changed were kept ('--overwrite' "
                f"replaces them): {', '.join(kept[:_NAMED])}{', ...' if kept[_NAMED:] else ''}"
            )
        if left := self._search.left_out:
            kinds = [f"{count:,} {end or 'without'}" for end, count in left.most_common(_NAMED)]
            files = (
                "1 other file was" if left.total() == 1 else f"{left.total():,} other files were"
            )
            note(f"{files} left out: {', '.join(kinds)}")

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C finish what is under way, and the second stop at once."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError, ValueError):  # Windows: Ctrl-C cancels all
            loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signal.SIGINT)

    def _interrupt(self) -> None:
        if self.interrupted:
            self._scope.cancel()
            return
        self.interrupted = True
        self._scope.deadline = asyncio.get_running_loop().time() + self._grace
        note(f"Finishing what is under way, for {self._grace:g} seconds at most; Ctrl-C: stop now.")
        self._stop()


def _print_line(data: bytes) -> None:
    print_json(msgspec.Raw(data))
