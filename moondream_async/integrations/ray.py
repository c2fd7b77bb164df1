"""Ray Data: captions, answers, boxes and points for a dataset, on as many machines as Ray has.

`ask` adds columns to a dataset::

    import ray
    from .ray import ask

    photos = ray.data.read_parquet("s3://bucket/photos")  # with a column "path"
    photos = ask(photos, "caption", image_column="path", actors=4, rate_limit=10)
    photos.write_parquet("s3://bucket/captioned")

    photos = ask(photos, "detect", object="person", image_column="path", prefix="person_")
    failed = photos.filter(expr="person_error_type is not None")

The key is read from MOONDREAM_API_KEY in the workers' environment, or passed as
`api_key`. Set it where the machines are started: Ray shows a ``runtime_env``
on its dashboard.

Where more is to be said about the stage than `ask` can, it is `SkillStage`::

    photos.map_batches(
        SkillStage,
        fn_constructor_kwargs={"skill": "caption", "actors": 4, "rate_limit": 10},
        batch_format="pyarrow",
        batch_size=32,
        compute=ray.data.ActorPoolStrategy(size=4),
        num_cpus=0.25,
        accelerator_type="...",
    )
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from moondream_async._checks import check_count
from moondream_async._protocol.secret import Secret
from moondream_async.errors import RequestError

from ._rows import Asker, Job, Options, kept

if TYPE_CHECKING:
    from typing import Unpack

    import pyarrow as pa
    from ray.data import Dataset

__all__ = ["Secret", "SkillStage", "ask"]


def ask(
    dataset: Dataset,
    skill: str = "caption",
    *,
    image_column: str = "image",
    text_column: str | None = None,
    prefix: str = "",
    actors: int = 2,
    batch_size: int | None = None,
    api_key: str | Secret | None = None,
    ray_options: Mapping[str, Any] | None = None,
    **options: Unpack[Options],
) -> Dataset:
    """Return the dataset with a column for the answers, and some about them.

    These are ``caption``, ``answer``, ``objects`` or ``points``, with places in 0-1 of
    the picture; ``reasoning``, where it was asked for; ``request_id`` and
    ``finish_reason``; ``error_type`` and ``error_message``, which are null where
    there is an answer. Like everything in Ray Data, it is done when somebody wants
    the rows.

    A picture that is missing or broken, and a request that fails after its retries,
    become errors in their rows. Only a key that the server refuses ends the run: Ray
    raises its ``UserCodeException``, whose text names our `AuthenticationError`.

    When a worker dies, Ray starts another and does the blocks anew that were under
    way: no row is lost, none comes twice, but some are asked for, and paid, twice.
    With fewer rows to a block they are fewer.

    Args:
        dataset: Rows with pictures.
        skill: ``caption``, ``query``, ``detect`` or ``point``.
        image_column: Holds the pictures: paths that the workers can open, bytes of
            files, arrays (height x width x 3, of uint8), or mappings of these as
            Hugging Face stores them (``bytes`` and ``path``).
        text_column: Holds each row's question or object, in place of `question` or
            `object` for all.
        prefix: What the names of the new columns begin with.
        actors: How many workers there are. They share the rate limit equally, each
            keeping to its part: a worker that idles leaves that unused.
        batch_size: Rows that a worker takes up together; None is as many as it has
            requests open. Arrays of large pictures may want fewer.
        api_key: The key. None leaves it to the environment of each worker.
        ray_options: More for ``map_batches``, as ``num_cpus``: each worker reserves a
            quarter of a CPU, since it mostly waits.
        **options: The skill's own (`length`, `question`, `reasoning`, `object`,
            `settings`) and the client's; see `Options`. `rate_limit` is that of all
            workers together, `max_connections` that of each, 32 by default.

    Raises:
        RequestError: An argument can't be right; nothing was read or sent. When the
            run has begun, it ends with one for a column that isn't there, or that
            is there already and would be lost.
    """
    api_key, kept_options = kept(api_key, options)
    del options
    constructor: dict[str, Any] = {
        "skill": skill,
        "image_column": image_column,
        "text_column": text_column,
        "prefix": prefix,
        "actors": actors,
        "api_key": api_key,
        **kept_options,
    }
    job = _job(**constructor)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    if not hasattr(dataset, "map_batches"):
        raise RequestError(f"dataset must be a Dataset of Ray Data, not {type(dataset).__name__}")
    from ray.data import ActorPoolStrategy  # noqa: PLC0415 - not needed to refuse arguments

    settings = {
        "batch_size": batch_size or job.connections,
        "compute": ActorPoolStrategy(size=actors),
        "num_cpus": 0.25,
        **(ray_options or {}),
    }
    return dataset.map_batches(
        SkillStage, fn_constructor_kwargs=constructor, batch_format="pyarrow", **settings
    )


class SkillStage:
    """The stage of `ask`, for ``map_batches``: a client, and what it asks about each row.

    It takes and gives batches in the format ``pyarrow``, and has many requests open at
    once, of several batches. Ray makes one in each actor; when the actor goes, the
    client is closed.

    The arguments are those of `ask`. `actors` has to be given here, too, and `api_key`
    has to be a `Secret`.

    Raises:
        RequestError: An argument can't be right, or there is no key for the cloud.
    """

    def __init__(
        self,
        skill: str = "caption",
        *,
        image_column: str = "image",
        text_column: str | None = None,
        prefix: str = "",
        actors: int = 1,
        api_key: Secret | None = None,
        **options: Unpack[Options],
    ) -> None:
        is_plain = isinstance(api_key, str)
        api_key, kept_options = kept(api_key, options)
        del options
        if is_plain:
            raise RequestError("api_key must be a Secret here: plans would print a plain string")
        self._job = _job(
            skill=skill,
            image_column=image_column,
            text_column=text_column,
            prefix=prefix,
            actors=actors,
            api_key=api_key,
            **kept_options,
        )
        self._asker = Asker(self._job)
        self._asker.start()
        # Ray drops the stage when it is done with the actor.
        weakref.finalize(self, self._asker.close)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with its answers.

        Raises:
            AuthenticationError: The server refuses the key. No later batch is sent.
            RequestError: The batch lacks a column, or has one that would be lost.
        """
        if not batch.num_rows:  # some of Ray's operators give none, without columns
            return batch
        self._job.check_columns(batch.column_names)
        rows = [partial(_read, self._job, batch, number) for number in range(batch.num_rows)]
        answers = await self._asker.ask(rows)
        return _with_answers(batch, self._job.columns, answers)


def _job(*, actors: int, **arguments: Any) -> Job:
    check_count("actors", actors)
    fields = {name: arguments.pop(name) for name in Job.__struct_fields__ if name in arguments}
    return Job(workers=actors, options=arguments, **fields)


def _read(job: Job, batch: pa.Table, number: int) -> tuple[Any, Any]:
    columns = (job.image_column, job.text_column)
    image, text = (None if name is None else batch[name][number].as_py() for name in columns)
    return image, text


def _with_answers(
    batch: pa.Table, columns: Mapping[str, str], answers: list[dict[str, Any]]
) -> pa.Table:
    import pyarrow as pa  # noqa: PLC0415 - the worker has it, and who only plans needs it not

    def struct(*names: str) -> pa.DataType:
        return pa.list_(pa.struct([(name, pa.float64()) for name in names]))

    # Told and not guessed: a batch in which all is well has no errors to guess a type from.
    types = {"objects": struct("x_min", "y_min", "x_max", "y_max"), "points": struct("x", "y")}
    for field, name in columns.items():
        values = [answer[name] for answer in answers]
        batch = batch.append_column(name, pa.array(values, types.get(field, pa.string())))
    return batch
