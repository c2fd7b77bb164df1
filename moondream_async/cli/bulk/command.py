"""The command ``bulk``: the same question about many pictures, and a file of the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moondream_async import MoondreamClient, Timeout
from moondream_async.cli import _options as options
from moondream_async.cli._options import UsageError
from moondream_async.cli._session import run
from moondream_async.errors import RequestError
from moondream_async.types import Length

Skill = Literal["caption", "query", "detect", "point"]
Via = Literal["requests", "batch-api"]


def bulk(
    context: typer.Context,
    *,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATHS...",
            help="Pictures, folders with all below them, patterns, or - to read paths from stdin.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Where the answers go: a file named .jsonl, .csv, .parquet, .jsonl.gz or "
            ".csv.gz, a folder (with a / behind it) for a .txt beside each picture's name, "
            "or - for lines of JSON on stdout.",
        ),
    ],
    skill: Annotated[Skill, typer.Option(help="What to ask.")] = "caption",
    question: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question, for query.")
    ] = None,
    object: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to look for, for detect and point.")
    ] = None,
    length: Annotated[Length | None, typer.Option(help="How much to say, for caption.")] = None,
    reasoning: Annotated[
        bool | None,
        typer.Option("--reasoning/--no-reasoning", help="Let the model think first, for query."),
    ] = None,
    from_file: Annotated[
        list[str] | None,
        typer.Option(metavar="LIST", help="A file with a path on each line."),
    ] = None,
    via: Annotated[
        Via, typer.Option(help="The server's Batch API takes longer, and half the price.")
    ] = "requests",
    concurrency: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many requests may be open at most.")
    ] = 100,
    rate_limit: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="Requests a second at most. [default: what the server takes]"
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(metavar="N", min=0, help="How often a request that failed is repeated.")
    ] = 3,
    grace: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="How long Ctrl-C lets what is under way go on."
        ),
    ] = 5,
    report: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write a page of pictures and answers, to be looked at."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace texts and files that no run has made.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Ask the same about many pictures.

    Each picture is a line of JSON in the file as soon as it is done, in the order in
    which they end: {"path": ..., "skill": ..., "caption": ...}, or with "error" in place
    of an answer. Run again, it asks only about pictures that are missing or failed, or
    whose file has changed; those are known by their path, size, time and SHA-256. The other
    forms are made from such a file beside them, which is kept for that; lines on stdout
    can't be gone on from.

    The exit status is 1 when a picture failed. Ctrl-C finishes what is under way; a
    second one stops at once.
    """
    arguments: dict[str, Any] = {"question": question, "object": object, "length": length}
    arguments["reasoning"] = reasoning
    arguments["settings"] = {
        name: value
        for name, value in (
            ("max_tokens", max_tokens),
            ("temperature", temperature),
            ("top_p", top_p),
        )
        if value is not None
    } or None
    needed = {"query": "question", "detect": "object", "point": "object"}.get(skill)
    if needed and not arguments[needed]:
        raise UsageError(f"'--skill {skill}' needs '--{needed}'", context)
    if skill == "caption" and length is None:
        arguments["length"] = "normal"
    if not paths and not from_file:
        raise UsageError("Missing argument 'PATHS...'", context)
    if rate_limit is not None and rate_limit <= 0:
        raise UsageError("Invalid value for '--rate-limit': it must be over 0", context)
    from .outputs import Output  # noqa: PLC0415 - --help does without
    from .report import check_report  # noqa: PLC0415 - likewise

    try:
        wanted = Output.of(output)
    except RequestError as error:
        raise UsageError(str(error), context) from None
    if wanted.form == "folder" and skill not in ("caption", "query"):
        raise UsageError(f"'--skill {skill}' gives no text: '-o' must be a file", context)
    wanted.check(overwrite=overwrite)
    if report is not None:
        check_report(report)
    limits = Timeout() if timeout is None else Timeout(first_event=None, idle=None, total=timeout)
    client = MoondreamClient(
        endpoint=endpoint,
        model=model,
        timeout=limits,
        max_connections=concurrency,
        max_retries=retries,
        rate_limit=rate_limit,
    )
    from .job import Job  # noqa: PLC0415 - --help does without

    asked = {name: value for name, value in arguments.items() if value is not None}
    job = Job(client, skill, asked, model=model, output=wanted, report=report, overwrite=overwrite)
    job.sources(paths or [], from_file or [])
    run(job.run(grace, by_batch=via == "batch-api"))
    if job.interrupted:
        raise KeyboardInterrupt
    if job.failed:
        raise typer.Exit(1)
