"""`ft`: the official SDK's finetune object, with methods to await.

`ft` is for programs that are written for the SDK; others use `client.tuning`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ._checks import check_count
from ._client import MoondreamClient, hidden_address
from ._protocol.secret import Secret, hidden
from .errors import RequestError
from .tuning.records import Finetune, MetricsLog, Rollouts, TrainStep
from .tuning.wire import LEARNING_RATE, TuningRequest
from .types import Settings

if TYPE_CHECKING:
    from yarl import URL


class FinetuneClient:
    """A finetune with a client of its own, and the methods of the official SDK's object.

    Use it in an ``async with``, or call `aclose` at the end. `Tuning` describes the errors
    of the methods, and the effect of cancelling them.

    >>> async def main():
    ...     async with await md.ft(name="windows", rank=8) as finetune:
    ...         truth = {"points": [{"x": 0.5, "y": 0.5}]}
    ...         asked = {"image": md.SAMPLE_IMAGE, "object": "window", "ground_truth": truth}
    ...         tried = await finetune.rollouts("point", **asked, num_rollouts=2)
    ...         keys = ("request", "rollouts", "rewards")
    ...         group = {"mode": "rl", **{key: tried[key] for key in keys}}
    ...         step = await finetune.train_step([group], lr=0.001)
    ...         await finetune.log_metrics(step.step, {"loss": 0.5})
    ...         requests = [("mine", {"skill": "point", **asked})]
    ...         async for context, tried in finetune.rollout_stream(requests):
    ...             print(context, len(tried.rollouts))
    ...         await finetune.save_checkpoint()
    ...         page = await finetune.list_checkpoints(limit=10)
    ...         print(finetune.model(1).endswith("@1"), [each.step for each in page["checkpoints"]])
    ...         await finetune.delete_checkpoint(1)
    ...         await finetune.delete()
    >>> asyncio.run(main())
    mine 1
    True [1]
    """

    def __init__(self, client: MoondreamClient, finetune: Finetune) -> None:
        self._client = client
        self._finetune = finetune

    @property
    def finetune_id(self) -> str:
        """The server's id of the finetune."""
        return self._finetune.finetune_id

    @property
    def name(self) -> str | None:
        """The name of the finetune."""
        return self._finetune.name

    @property
    def rank(self) -> int | None:
        """The rank of its adapter."""
        return self._finetune.rank

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the client. May be called twice."""
        await self._client.aclose()

    async def rollouts(
        self,
        skill: str,
        *,
        image: Any = None,
        question: str | None = None,
        object: str | None = None,
        num_rollouts: int = 1,
        settings: Settings | None = None,
        reasoning: bool = False,
        spatial_refs: Sequence[Any] | None = None,
        ground_truth: Mapping[str, Any] | None = None,
    ) -> Rollouts:
        """Let the model answer a request; see `Tuning.rollouts`.

        Raises:
            RequestError: An argument is invalid, or the skill does not have it.
            ImageError: The picture can't be read.
        """
        arguments = {
            "skill": skill,
            "image": image,
            "question": question,
            "object": object,
            "settings": settings,
            "reasoning": reasoning,
            "spatial_refs": spatial_refs,
            "ground_truth": ground_truth,
        }
        tuning = self._client.tuning
        request = _request(arguments)
        return await tuning.rollouts(self._finetune, request, num_rollouts=num_rollouts)

    async def rollout_stream(
        self,
        requests: Iterable[tuple[Any, Mapping[str, Any]]],
        *,
        max_concurrency: int = 4,
        buffer_size: int = 8,
    ) -> AsyncGenerator[tuple[Any, Rollouts], None]:
        """Let the model answer many requests; yield each context with its answers when done.

        Args:
            requests: Pairs of a context, which is yielded again, and the arguments of
                `rollouts`.
            max_concurrency: The most requests under way or waiting for the reader.
            buffer_size: Without effect: an argument of the SDK's.

        Raises:
            RequestError: An argument is invalid.
            ImageError: A picture can't be read.
        """
        check_count("buffer_size", buffer_size)

        def made() -> Iterable[TuningRequest]:
            for context, arguments in requests:
                given = dict(arguments)
                tries = given.pop("num_rollouts", 1)
                request = _request(given)
                yield msgspec.structs.replace(request, context=context, num_rollouts=tries)

        results = self._client.tuning.rollout_stream(
            self._finetune, made(), max_concurrency=max_concurrency
        )
        async with aclosing(results):
            async for request, rollouts in results:
                yield request.context, rollouts

    async def train_step(
        self, groups: Sequence[Any], lr: float = LEARNING_RATE, **kwargs: Any
    ) -> TrainStep:
        """Train the model by one step; see `Tuning.train_step`.

        Raises:
            RequestError: An argument is invalid.
        """
        return await self._client.tuning.train_step(self._finetune, groups, lr=lr, **kwargs)

    async def log_metrics(self, step: int, metrics: Mapping[str, float]) -> MetricsLog:
        """Log your own metrics of a step, for the dashboard.

        Raises:
            RequestError: A value is not a finite number.
        """
        return await self._client.tuning.log_metrics(self._finetune, step, metrics)

    async def list_checkpoints(self, limit: int = 50, cursor: str | None = None) -> dict[str, Any]:
        """Return a page of the saved checkpoints: `checkpoints`, `next_cursor`, `has_more`.

        Raises:
            RequestError: `limit` is not between 1 and 100.
        """
        return await self._client.tuning.checkpoint_page(self._finetune, limit=limit, cursor=cursor)

    async def save_checkpoint(self) -> dict[str, Any]:
        """Save the state after the last step; return ``{"ok": True, "checkpoint": ...}``.

        Raises:
            NotFoundError: The finetune was never trained.
        """
        checkpoint = await self._client.tuning.save_checkpoint(self._finetune)
        return {"ok": True, "checkpoint": checkpoint}

    async def delete_checkpoint(self, step: int) -> None:
        """Delete a checkpoint.

        Raises:
            NotFoundError: There is no such checkpoint.
        """
        await self._client.tuning.delete_checkpoint(self._finetune, step)

    async def delete(self) -> None:
        """Delete the finetune with its checkpoints.

        Raises:
            NotFoundError: The finetune was deleted before.
        """
        await self._client.tuning.delete(self._finetune)

    def model(self, step: int) -> str:
        """Return the name of its state at a saved step, to pass as ``model=``."""
        return self._finetune.model(step)


async def ft(
    api_key: str | Secret | None = None,
    *,
    name: str | None = None,
    rank: int | None = None,
    finetune_id: str | None = None,
    endpoint: str | URL | None = None,
    **options: Any,
) -> FinetuneClient:
    """Return a finetune, by its id or by its name, as the official SDK's ``ft`` does.

    Args:
        api_key: As for `MoondreamClient`.
        name: The name of the finetune, which is created if there is none. Needs `rank`.
        rank: 8, 16, 24 or 32.
        finetune_id: The id of a finetune, in place of `name` and `rank`.
        endpoint: As for `MoondreamClient`, with or without ``/tuning`` at its end.
        options: Further arguments of `MoondreamClient`.

    Raises:
        RequestError: Neither an id nor a name and a rank were given, or both.
        APIConnectionError, APITimeoutError, APIStatusError: See `errors`.

    >>> async def main():
    ...     async with await md.ft(name="roofs", rank=8) as finetune:
    ...         return finetune.name, finetune.rank
    >>> asyncio.run(main())
    ('roofs', 8)
    """
    # Secrets are hidden first, since tracebacks may show the values of variables.
    key, where = hidden(api_key), _without_tuning(hidden_address(endpoint))
    del api_key, endpoint
    if "proxy" in options:
        options["proxy"] = hidden_address(options["proxy"])
    if (finetune_id is None) == (name is None) or (name is None) != (rank is None):
        raise RequestError("ft needs either finetune_id, or both name and rank")
    client = MoondreamClient(key, where, **options)
    try:
        if finetune_id is not None:
            return FinetuneClient(client, await client.tuning.get(finetune_id))
        assert name is not None and rank is not None  # noqa: PT018, S101 - for the type checker
        return FinetuneClient(client, await client.tuning.create(name, rank=rank))
    except BaseException:
        await client.aclose()
        raise


def _without_tuning(endpoint: Secret | None) -> Secret | None:
    return endpoint and Secret(endpoint.reveal().rstrip("/").removesuffix("/tuning"))


def _request(arguments: Mapping[str, Any]) -> TuningRequest:
    """Make a request of the SDK's arguments, without those that are None or False."""
    given = {
        key: value for key, value in arguments.items() if value is not None and value is not False
    }
    skill = given.pop("skill", None)
    if skill not in ("query", "detect", "point"):
        raise RequestError(f"skill must be query, detect or point, not {skill!r}")
    make: Callable[..., TuningRequest] = getattr(TuningRequest, skill)
    try:
        return make(given.pop("image", None), **given)
    except TypeError as error:  # another skill's argument
        raise RequestError(f"{skill}: {error}") from None
