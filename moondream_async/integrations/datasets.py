"""Hugging Face datasets: captions, answers, boxes and points as columns.

`ask` adds them to a dataset::

    from datasets import Image, load_dataset
    from .datasets import ask

    photos = load_dataset("imagefolder", data_dir="photos", split="train")
    photos = photos.cast_column("image", Image(decode=False))
    captioned = ask(photos, "caption", length="short", rate_limit=10)
    failed = captioned.filter(lambda row: row["error_type"] is not None)

With ``decode=False`` the files are sent as they are; without, they are decoded here,
and encoded anew.

`asking` gives the function alone, for ``map`` with options of its own, and for datasets
that are streamed::

    with asking("detect", object="person") as ask_row:
        for row in streamed.map(ask_row):
            print(row["objects"])

``map`` runs an async function on an event loop that it starts itself. Where one runs
already, as in notebooks, it can't: there, ``await asyncio.to_thread(ask, photos)``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moondream_async._checks import check_count
from moondream_async._protocol.secret import Secret
from moondream_async.errors import RequestError

from ._rows import Asker, Job, Options, kept

if TYPE_CHECKING:
    from typing import Unpack

    from datasets import Dataset, Features

__all__ = ["Secret", "ask", "asking"]


def ask(
    dataset: Dataset,
    skill: str = "caption",
    *,
    image_column: str = "image",
    text_column: str | None = None,
    prefix: str = "",
    num_proc: int | None = None,
    api_key: str | Secret | None = None,
    map_options: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Return the dataset with a column for the answers, and some about them.

    These are ``caption``, ``answer``, ``objects`` or ``points``, with places in 0-1 of
    the picture; ``reasoning``, where it was asked for; ``request_id`` and
    ``finish_reason``; ``error_type`` and ``error_message``, which are None where
    there is an answer.

    A picture that is missing or broken, and a request that fails after its retries,
    become errors in their rows. Like any ``map``, it is done once: the same dataset
    asked the same again comes from the cache of `datasets`, errors included, unless
    ``map_options={"load_from_cache_file": False}`` says otherwise. A key that is
    passed is part of what is the same; one in the environment isn't.

    Args:
        dataset: Rows with pictures, in memory or on disk. For one that is streamed
            see `asking`.
        skill: ``caption``, ``query``, ``detect`` or ``point``.
        image_column: Holds the pictures, as an ``Image`` feature or as paths.
        text_column: Holds each row's question or object, in place of `question` or
            `object` for all.
        prefix: What the names of the new columns begin with.
        num_proc: How many processes do it; one is seldom too few, since it mostly
            waits. They share the rate limit equally.
        api_key: The key; else that of the environment variable MOONDREAM_API_KEY.
        map_options: More for ``map``.
        **options: The skill's own (`length`, `question`, `reasoning`, `object`,
            `settings`) and the client's; see `Options`. `rate_limit` is that of all
            processes together, `max_connections` that of each, 32 by default.

    Raises:
        RequestError: An argument can't be right, or a column isn't there, or is
            there already and would be lost. Nothing was read or sent.
        AuthenticationError: The server refuses the key.
    """
    api_key, kept_options = kept(api_key, options)
    del options
    if num_proc is not None:
        check_count("num_proc", num_proc)
    job = Job(
        skill=skill,
        image_column=image_column,
        text_column=text_column,
        prefix=prefix,
        workers=num_proc or 1,
        api_key=api_key,
        options=kept_options,
    )
    if not hasattr(dataset, "num_rows") or not hasattr(dataset, "features"):
        raise RequestError(
            f"dataset must be a Dataset, not {type(dataset).__name__}; use asking() with a "
            "dataset that is streamed, and the splits of several one by one"
        )
    job.check_columns(dataset.column_names)
    with _open(job) as asker:
        return dataset.map(
            asker.ask_row,
            features=_features(dataset.features, job),
            num_proc=num_proc,
            **(map_options or {}),
        )


@contextmanager
def asking(
    skill: str = "caption",
    *,
    image_column: str = "image",
    text_column: str | None = None,
    prefix: str = "",
    num_proc: int = 1,
    api_key: str | Secret | None = None,
    **options: Unpack[Options],
) -> Iterator[Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]]:
    """Give an async function for ``map``, which asks about one row and returns its columns.

    Leaving the ``with`` closes its client; so rows of a dataset that is streamed are to
    be read within. The arguments are those of `ask`; `num_proc` has to be given here,
    too. Not for ``batched=True``: it has many rows under way at once as it is.

    The columns' types are guessed by `datasets` from the first thousand rows, unless
    ``map`` is given ``features``. `ask` does that.

    Raises:
        RequestError: An argument can't be right; nothing was read or sent. In ``map``:
            a column isn't there, or is there already and would be lost.
        AuthenticationError: In ``map``: the server refuses the key.
    """
    api_key, kept_options = kept(api_key, options)
    del options
    check_count("num_proc", num_proc)
    job = Job(
        skill=skill,
        image_column=image_column,
        text_column=text_column,
        prefix=prefix,
        workers=num_proc,
        api_key=api_key,
        options=kept_options,
    )
    with _open(job) as asker:
        yield asker.ask_row


@contextmanager
def _open(job: Job) -> Iterator[Asker]:
    asker = Asker(job)
    try:
        job.client()  # what the environment lacks is reported before the first row is read
        yield asker
    finally:
        asker.close()


def _features(old: Features, job: Job) -> Features:
    from datasets import Features, Value  # noqa: PLC0415 - not needed to refuse arguments

    def struct(*names: str) -> list[dict[str, Value]]:
        return [{name: Value("float64") for name in names}]

    # Told and not guessed: `datasets` takes a column without any error for one of nulls, and
    # breaks off at the first one that comes later.
    types = {"objects": struct("x_min", "y_min", "x_max", "y_max"), "points": struct("x", "y")}
    new = {name: types.get(field, Value("string")) for field, name in job.columns.items()}
    return Features({**old, **new})
