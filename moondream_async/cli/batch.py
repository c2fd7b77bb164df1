"""The command group ``batch``: the server's own Batch API."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moondream_async import Batch, BatchRequest
from moondream_async.types import Length

from . import _options as options
from ._files import replacing
from ._options import UsageError
from ._output import encode_json, note, print_json, print_text
from ._session import run

Skill = Literal["caption", "query", "detect", "point"]
BatchId = Annotated[str, typer.Argument(metavar="ID", help="The batch's id.", show_default=False)]


def create(
    context: typer.Context,
    *,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Pictures; or one .jsonl file in the server's own format.",
            show_default=False,
        ),
    ],
    skill: Annotated[
        Skill | None, typer.Option(help="What to ask of each picture. [default: caption]")
    ] = None,
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For query: the question.")
    ] = None,
    object: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For detect and point: what to look for.")
    ] = None,
    length: Annotated[
        Length | None, typer.Option(help="For caption: how much to say. [default: normal]")
    ] = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
) -> None:
    """Upload a batch, and print its id. Each picture's path is the id of its answer.

    Ctrl-C aborts the upload, on the server too.
    """
    asked = {"length": length, "question": question, "object": object}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(files) == 1 and files[0].endswith(".jsonl"):
        for name in [*asked, *(["skill"] if skill else [])]:
            raise UsageError(f"'--{name}' is for pictures; a .jsonl file says it itself", context)
        requests: str | list[BatchRequest] = files[0]
    else:
        skill = skill or "caption"
        options.check_asked(context, skill, asked)
        make: Any = getattr(BatchRequest, skill)
        requests = [make(path, id=path, **asked) for path in files]

    async def upload() -> None:
        async with server.client() as client:
            batch = await client.batches.create(requests, on_progress=_report_progress)
        _print_batch(batch, as_json=as_json)

    run(upload())


async def list_(*, as_json: options.AsJson = False, client: options.Client) -> None:
    """List the account's batches, a line each."""
    async for batch in client.batches.list():
        _print_batch(batch, as_json=as_json)


async def get(*, batch: BatchId, as_json: options.AsJson = False, client: options.Client) -> None:
    """Tell how far a batch is."""
    _print_batch(await client.batches.get(batch), as_json=as_json)


async def wait(*, batch: BatchId, as_json: options.AsJson = False, client: options.Client) -> None:
    """Wait until a batch has ended; --timeout limits each question, not the wait."""
    _print_batch(await client.batches.wait(batch), as_json=as_json)


async def results(
    *,
    batch: BatchId,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Write them there, once all have arrived."
        ),
    ] = None,
    client: options.Client,
) -> None:
    """Print the answers of a batch that has completed, a JSON object a line, in no order.

    Lines that failed are among them, with their error.
    """
    if output is None:
        async for result in client.batches.results(batch):
            print_json(result.raw)
        return
    failed = total = 0
    with replacing(output) as file:
        async for result in client.batches.results(batch):
            file.write(encode_json(result.raw) + b"\n")
            total += 1
            failed += not result.ok
    note(f"Written: {output}, {total} answers, of which {failed} failed")


def _report_progress(sent: int, total: int) -> None:
    note(f"{sent / 1e6:.1f} of {total / 1e6:.1f} MB uploaded")


def _print_batch(batch: Batch, *, as_json: bool) -> None:
    if as_json:
        print_json(batch.raw)
        return
    done = batch.progress
    print_text(
        f"{batch.id}  {batch.status}  {done.completed} of {done.total} done, {done.failed} failed"
    )
    if batch.error is not None:
        note(f"{batch.error.code}: {batch.error.message}")


app = typer.Typer(help="Hand many pictures over, and fetch the answers later.")
_commands: list[Callable[..., object]] = [create, list_, get, wait, results]
for _command in _commands:
    app.command(_command.__name__.rstrip("_"))(options.expand(_command))
