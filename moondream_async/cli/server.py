"""The commands that ask about a server."""

from __future__ import annotations

from . import _options as options
from ._output import print_json, print_text
from ._session import make_client, run


def models(
    *,
    as_json: options.AsJson = False,
    endpoint: options.Endpoint = None,
    timeout: options.Timeout = None,
) -> None:
    """List the models that the server offers, a line each.

    With --json, a line is an object as the server sent it.
    """
    run(_models(endpoint, timeout, as_json=as_json))


async def _models(endpoint: str | None, timeout: float | None, *, as_json: bool) -> None:
    async with make_client(endpoint=endpoint, timeout=timeout) as client:
        for model in await client.models():
            if as_json:
                print_json(model.raw)
            else:
                said = [model.id, model.name, model.description]
                print_text("  ".join(each for each in said if each))
