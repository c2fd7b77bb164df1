"""The command ``serve``: the simulator, for other programs to talk to."""

from __future__ import annotations

import contextlib
import shlex
import time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ._options import UsageError
from ._output import one_line, print_text
from ._session import listening, run

if TYPE_CHECKING:
    from moondream_async.simulator import ReceivedRequest, Simulator

# The simulator's own list would load aiohttp, and --help does without.
Dialect = Literal["cloud", "kestrel", "station", "old"]


def serve(
    context: typer.Context,
    *,
    host: Annotated[str, typer.Option(metavar="HOST", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(metavar="PORT", min=0, max=65535, help="Where to listen; 0 is any free port."),
    ] = 2020,
    rate: Annotated[
        float,
        typer.Option(metavar="TOKENS_PER_SECOND", min=0, help="Its pace; 0 is without pauses."),
    ] = 30,
    dialect: Annotated[Dialect, typer.Option(help="Which server it speaks like.")] = "cloud",
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="What goes wrong with the next request, as stall=3, or with more of them, as "
            "status=429,times=2. May be given several times. '--fault help' lists all there are.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="The only key to let in, any word of yours. Only as cloud."
        ),
    ] = None,
) -> None:
    """Run a server that speaks the Moondream API, until Ctrl-C.

    It writes a line for each request. It runs no model: it describes what it can
    measure in the picture that it is sent, in the same words each time. It is there for
    trials and tests.
    """
    if api_key is not None and dialect != "cloud":
        raise UsageError(f"'--api-key' has no effect with '--dialect {dialect}'", context)
    from moondream_async.simulator import (  # noqa: PLC0415 - loads aiohttp
        Fault,
        Simulator,
        describe_faults,
    )

    if fault and "help" in fault:
        typer.echo(describe_faults())
        return
    try:
        faults = [Fault.parse(text) for text in fault or ()]
    except ValueError as error:
        raise UsageError(f"Invalid value for '--fault': {error}", context) from error
    simulator = Simulator(
        dialect, rate, api_key, faults, host=host, port=port, keep=0, on_end=_report_request
    )
    run(_serve(simulator, f"{host}:{port}", needs_key=api_key is not None))


def _report_request(request: ReceivedRequest) -> None:
    """Print a line about a request that has ended."""
    said = f"{request.method} {request.path} {request.status or '-'}"
    if request.stream:
        said += f" {request.events_sent} events"
    if request.disconnected:
        said += " hung up"
    with contextlib.suppress(OSError):  # where stdout is closed, the server goes on
        print_text(f"{time.strftime('%H:%M:%S')} {one_line(said)} {request.seconds:.2f} s")


async def _serve(simulator: Simulator, address: str, *, needs_key: bool) -> None:
    import anyio  # noqa: PLC0415 - --help and errors of usage do without

    async with listening(simulator, address):
        _announce(simulator, needs_key=needs_key)
        await anyio.sleep_forever()


def _announce(simulator: Simulator, *, needs_key: bool) -> None:
    from moondream_async.simulator import SAMPLE_IMAGE  # noqa: PLC0415 - loads aiohttp

    picture = shlex.quote(str(SAMPLE_IMAGE))
    key = """ -H "X-Moondream-Auth: $MOONDREAM_API_KEY\"""" if needs_key else ""
    # printf is part of the shell: its arguments, unlike curl's, may have any size.
    body = """'{"stream": true, "image_url": "data:image/jpeg;base64,%s"}'"""
    curl = f"curl -N {simulator.endpoint}/caption -H 'Content-Type: application/json'{key} -d @-"
    lines = [
        f"Listening on {simulator.endpoint} until Ctrl-C. No model runs here.",
        "",
        "For the other commands, and for Python:",
        f"export MOONDREAM_ENDPOINT={simulator.endpoint}",
        "",
        "With curl:",
        f"""printf {body} "$(base64 < {picture} | tr -d '\\n')" | {curl}""",
    ]
    typer.echo("\n".join(lines))
