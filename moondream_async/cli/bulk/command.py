"""The command ``bulk``: the same question about many pictures, and a file of the answers."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moondream_async import Hooks
from moondream_async.cli import _options as options
from moondream_async.cli._options import UsageError
from moondream_async.cli._output import print_text
from moondream_async.cli._session import run
from moondream_async.errors import RequestError

Via = Literal["requests", "batch-api"]


def bulk(  # noqa: C901, PLR0912, PLR0915 - each option is checked once, and here
    context: typer.Context,
    *,
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATHS...",
            help="Pictures, videos, folders with all pictures below them, patterns, tables (.csv, "
            ".tsv, .jsonl, .parquet) with a column of pictures, WebDataset's shards (.tar), "
            "addresses (s3://, gs://, https://), or - to read paths from stdin.",
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
            ".csv.gz, .coco.json for boxes, .vtt or .srt for captions of one video, .tar or "
            "set/%06d.tar for WebDataset's shards; a folder (with a / behind it) for a .txt "
            "beside each picture's name, and YOLO's labels for detect; or - for lines of JSON on "
            "stdout.",
        ),
    ],
    asked: options.Asked,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=QUESTION",
            help="A question of several, for query; its answers have the name. Repeatable.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Only pictures of such names.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="No pictures of such names.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A table's column of pictures, or the end of their names in shards. "
            "[default: path, image; any]",
        ),
    ] = None,
    every: options.Every = None,
    allow_network: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CIDR",
            help="A network whose web servers give pictures, too, as 10.1.0.0/16. Repeatable. "
            "[default: the public internet]",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ask about N pictures at most.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell how many, how much and how long, and ask nothing."),
    ] = False,
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
            metavar="N",
            callback=options.check_positive,
            help="Requests a second at most. [default: what the server takes]",
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
    settings: options.Settings,
    server: options.OfModel,
) -> None:
    """Ask the same about many pictures.

    Each picture gets a line of JSON in the file as soon as it is done, in the order in
    which they end: {"path": ..., "skill": ..., "caption": ...}, or with "error" in place
    of an answer. Run again, it asks only about pictures that are missing or failed, or
    whose file has changed, by its path, size, time and SHA-256. The other forms are made
    from such a file of lines, which stays beside them; after lines on stdout, the next
    run begins anew.

    In a video, each frame is a picture, or one frame for each --every; its line has the
    frame's "time", in seconds.

    In a question or an object, {column} stands for the value in the picture's row of a
    table; a shard's sample has {__key__}, its .txt as {txt}, and the keys of its .json.

    The exit status is 1 when a picture failed. Ctrl-C finishes what is under way; a
    second one stops at once.
    """
    skill, arguments = asked
    by_batch = via == "batch-api"
    if not paths and not from_file:
        raise UsageError("Missing argument 'PATHS...'", context)
    if asks := _asks(context, ask or []):
        if skill not in ("caption", "query") or arguments.get("question") or by_batch:
            raise UsageError("'--ask' is for query by requests, without '--question'", context)
        skill = "query"
    options.check_asked(context, skill, arguments, needed=not asks)
    if skill == "caption":
        arguments.setdefault("length", "normal")
    if skill == "segment" and by_batch:
        raise UsageError("'--via batch-api' takes no '--skill segment'", context)
    from moondream_async.frames import check_video  # noqa: PLC0415 - --help does without

    from .containers import is_video  # noqa: PLC0415 - likewise
    from .exports import Output  # noqa: PLC0415 - likewise
    from .job import Job  # noqa: PLC0415 - likewise
    from .questions import Questions, find_column, may_have_rows  # noqa: PLC0415 - likewise
    from .remote import allow_networks  # noqa: PLC0415 - likewise
    from .report import check_report  # noqa: PLC0415 - likewise
    from .shards import check_shards, is_shard  # noqa: PLC0415 - likewise

    paths, lists = paths or [], from_file or []
    videos = any(map(is_video, paths))
    try:
        allow_networks(allow_network or ())
        wanted = Output.of(output)
    except RequestError as error:
        raise UsageError(str(error), context) from None
    rows, form = may_have_rows(paths, lists), wanted.form
    texts = [*asks.values(), *map(str, arguments.values())]
    column_asked = None if rows else find_column(texts)
    one_video = videos and len(paths) == 1 and not lists
    one_text = skill in ("caption", "query") and not asks
    one_class = skill == "detect" and "{" not in arguments["object"]
    for wrong, why in (
        (
            form in (".vtt", ".srt") and not (one_video and one_text),
            f"'-o {form}' is for '--skill caption' or query, and one video",
        ),
        (videos and by_batch, "'--via batch-api' takes no videos"),
        (
            form == "folder" and skill in ("point", "segment"),
            f"'--skill {skill}' gives no text: '-o' must be a file",
        ),
        (
            form == "folder" and not (one_text or one_class),
            "a folder takes one answer, or one class: '-o' must be a file",
        ),
        (
            column_asked is not None,
            f"{column_asked} stands for a table's column, and there is no table in PATHS",
        ),
        (form == ".coco.json" and skill != "detect", "'-o .coco.json' is for '--skill detect'"),
    ):
        if wrong:
            raise UsageError(why, context)
    if videos:
        check_video()
    if any(map(is_shard, paths)):
        check_shards()
    wanted.check(overwrite=overwrite)
    if report is not None:
        check_report(report)
    client = server.client(
        max_connections=concurrency, max_retries=retries, rate_limit=rate_limit, hooks=Hooks()
    )
    if settings is not None:
        arguments["settings"] = settings
    job = Job(
        client,
        Questions(skill, arguments, asks, server.model, rows=rows),
        wanted,
        paths,
        lists,
        report=report,
        overwrite=overwrite,
        limit=limit,
        include=include or (),
        exclude=exclude or (),
        column=column,
        every=every,
    )
    if dry_run:
        for line in run(job.dry_run(rate_limit, by_batch=by_batch)):
            print_text(line)
        return
    run(job.run(grace, by_batch=by_batch))
    if job.interrupted:
        raise KeyboardInterrupt
    if job.failed:
        raise typer.Exit(1)


def _asks(context: typer.Context, given: list[str]) -> dict[str, str]:
    asks: dict[str, str] = {}
    for each in given:
        name, equals, question = each.partition("=")
        if not (name and equals and question.strip()) or name in asks:
            raise UsageError(f"'--ask {each}': it must be NAME=QUESTION, each name once", context)
        asks[name] = question
    return asks
