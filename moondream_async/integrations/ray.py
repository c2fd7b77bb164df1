"""Ray Data: captions, answers, boxes and points for a dataset, on as many machines as Ray has.

`ask` adds columns to a dataset::

    import ray
    from moondream_async.integrations.ray import ask

    photos = ray.data.read_parquet("s3://bucket/photos")  # with a column "path"
    photos = ask(photos, "caption", image_column="path", actors=4, rate_limit=10)
    photos.write_parquet("s3://bucket/captioned")

    photos = ask(photos, "detect", object="person", image_column="path", prefix="person_")
    failed = photos.filter(expr="person_error_type is not None")

The key is passed as `api_key`, or comes from MOONDREAM_API_KEY in the workers'
environment. Set the variable where the machines are started: Ray shows a
``runtime_env`` on its dashboard.

`SkillStage` is the stage alone, for further arguments of ``map_batches``::

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

from ._rows import PLACES, Asker, Job, Options, kept

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
    """Return the dataset with columns for the answers.

    The new columns are ``caption``, ``answer``, ``objects`` or ``points``, with places in
    0-1 of the picture; ``reasoning``, if it was asked for; ``request_id`` and
    ``finish_reason``; ``error_type`` and ``error_message``, which are null in a row with
    an answer. Like everything in Ray Data, the work begins when the rows are read.

    A picture that is missing or broken, and a request that fails after its retries,
    become errors in their rows. Only a key that the server refuses ends the run: Ray
    raises its ``UserCodeException``, whose text names our `AuthenticationError`.

    When a worker dies, Ray starts another and repeats the blocks under way: each row has
    one result, but some rows are asked, and paid for, twice. Smaller blocks repeat fewer
    rows.

    Args:
        dataset: Rows with pictures.
        skill: ``caption``, ``query``, ``detect`` or ``point``.
        image_column: The column of pictures: paths that the workers can open, bytes of
            files, arrays (height x width x 3, of uint8), or mappings of these as
            Hugging Face stores them (``bytes`` and ``path``).
        text_column: The column of questions or objects, in place of `question` or
            `object` for all rows.
        prefix: The beginning of the new columns' names.
        actors: The number of workers. Each has an equal part of the rate limit, and an
            idle worker's part stays unused.
        batch_size: Rows that a worker takes together; None is the number of its open
            requests. With arrays of large pictures, fewer save memory.
        api_key: The key. None is the variable in each worker's environment.
        ray_options: Further arguments of ``map_batches``, as ``num_cpus``: a worker
            reserves a quarter of a CPU, since it mostly waits.
        **options: Arguments of the skill (`length`, `question`, `reasoning`, `object`,
            `settings`) and of the client; see `Options`. `rate_limit` is for all workers
            together, `max_connections` for each, 32 by default.

    Raises:
        RequestError: An argument is invalid; nothing was read or sent. During the run:
            a column is missing or would be overwritten.
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
    """The stage of `ask`, for ``map_batches``: a client, and its question about each row.

    A stage takes and returns batches in the format ``pyarrow``, and has many requests open
    at once, of several batches. Ray makes a stage in each actor; at the actor's end the
    client is closed.

    The arguments are those of `ask`. Pass the number of `actors` here as well as to Ray;
    `api_key` must be a `Secret`.

    Raises:
        RequestError: An argument is invalid, or there is no key for the cloud.
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
        # Ray drops the stage at the end of the actor.
        weakref.finalize(self, self._asker.close)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with its answers.

        Raises:
            AuthenticationError: The server refuses the key. No later batch is sent.
            RequestError: A column is missing or would be overwritten.
        """
        if not batch.num_rows:  # some of Ray's operators pass empty batches without columns
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
    import pyarrow as pa  # noqa: PLC0415 - workers have it; the planning process may not

    # Types are passed and not guessed: a batch without errors would not show theirs.
    types = {
        field: pa.list_(pa.struct([(name, pa.float64()) for name in names]))
        for field, names in PLACES.items()
    }
    for field, name in columns.items():
        values = [answer[name] for answer in answers]
        batch = batch.append_column(name, pa.array(values, types.get(field, pa.string())))
    return batch
