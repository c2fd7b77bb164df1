"""Hugging Face datasets: captions, answers, boxes and points as columns.

`ask` adds them to a dataset::

    from datasets import Image, load_dataset
    from moondream_async.integrations.datasets import ask

    photos = load_dataset("imagefolder", data_dir="photos", split="train")
    photos = photos.cast_column("image", Image(decode=False))
    captioned = ask(photos, "caption", length="short", rate_limit=10)
    failed = captioned.filter(lambda row: row["error_type"] is not None)

With ``decode=False`` the files are sent as they are; without, pictures are decoded and
encoded again.

`asking` gives the function alone, for ``map`` with other options, and for streamed
datasets::

    with asking("detect", object="person") as ask_row:
        for row in streamed.map(ask_row):
            print(row["objects"])

``map`` starts an event loop for an async function. In a notebook, where a loop runs
already, use ``await asyncio.to_thread(ask, photos)``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moondream_async._checks import check_count
from moondream_async._protocol.secret import Secret
from moondream_async.errors import RequestError

from ._rows import PLACES, Asker, Job, Options, kept

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
    """Return the dataset with columns for the answers.

    The new columns are ``caption``, ``answer``, ``objects`` or ``points``, with places in
    0-1 of the picture; ``reasoning``, if it was asked for; ``request_id`` and
    ``finish_reason``; ``error_type`` and ``error_message``, which are None in a row with
    an answer.

    A picture that is missing or broken, and a request that fails after its retries,
    become errors in their rows. Results of ``map`` are cached: the same call on the same
    dataset returns the first answers and errors, unless ``map_options`` has
    ``{"load_from_cache_file": False}``. The cache's key includes `api_key`, but not a key
    in the environment.

    Args:
        dataset: Rows with pictures, in memory or on disk. For a streamed dataset see
            `asking`.
        skill: ``caption``, ``query``, ``detect`` or ``point``.
        image_column: The column of pictures, an ``Image`` feature or paths.
        text_column: The column of questions or objects, in place of `question` or
            `object` for all rows.
        prefix: The beginning of the new columns' names.
        num_proc: The number of processes, which share the rate limit equally. One is
            usually enough, since a process mostly waits.
        api_key: The key. None is the environment variable MOONDREAM_API_KEY.
        map_options: Further arguments of ``map``.
        **options: Arguments of the skill (`length`, `question`, `reasoning`, `object`,
            `settings`) and of the client; see `Options`. `rate_limit` is for all
            processes together, `max_connections` for each, 32 by default.

    Raises:
        RequestError: An argument is invalid, or a column is missing or would be
            overwritten. Nothing was read or sent.
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
    """Give an async function for ``map``, which takes a row and returns its new columns.

    Leaving the ``with`` closes the client: read the rows of a streamed dataset inside.
    The arguments are those of `ask`; pass `num_proc` here as well as to ``map``. Do not
    use ``batched=True``: ``map`` runs the function for many rows at once anyway.

    Without ``features``, ``map`` guesses the types of the new columns from the first
    thousand rows. `ask` passes them.

    Raises:
        RequestError: An argument is invalid; nothing was read or sent. In ``map``: a
            column is missing or would be overwritten.
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
        job.client()  # so that a missing key is reported before the first row is read
        yield asker
    finally:
        asker.close()


def _features(old: Features, job: Job) -> Features:
    from datasets import Features, Value  # noqa: PLC0415 - not needed to refuse arguments

    # Types are passed and not guessed: `datasets` guesses "null" for a column of errors
    # without an error, and fails at the first error that comes later.
    types = {field: [{name: Value("float64") for name in names}] for field, names in PLACES.items()}
    new = {name: types.get(field, Value("string")) for field, name in job.columns.items()}
    return Features({**old, **new})
