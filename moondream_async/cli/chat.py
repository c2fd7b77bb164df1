"""The command ``chat``: a conversation in a terminal, with pictures."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moondream_async import ChatStream, MoondreamClient, MoondreamError

from . import _options as options
from ._output import note, print_events, print_json, print_pieces
from ._session import at_home, make_client

_HELP = "/image PATH adds a picture to the next message, /new begins anew, /quit or Ctrl-D ends."


def chat(
    *,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...", help="Pictures for the first message.", show_default=False
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="How the model is to behave.")
    ] = None,
    reasoning: Annotated[
        bool | None,
        typer.Option(
            "--reasoning/--no-reasoning",
            help="Let the model think first; what it thought is printed on stderr. "
            "[default: the server's]",
        ),
    ] = None,
    as_json: options.AsJson = False,
    endpoint: options.Endpoint = None,
    model: options.Model = None,
    timeout: options.Timeout = None,
) -> None:
    """Talk with a model, about pictures or about anything.

    Each line is a message. /image PATH adds a picture to the next one, /new begins a
    new conversation, and /quit or Ctrl-D ends. Ctrl-C stops an answer, or clears what
    is typed; the conversation goes on, but for a second Ctrl-C.

    Where input is no terminal, each of its lines is a message, and the first error
    ends it. With --json, every event of an answer is a line as it arrives, and the
    last is {"event": "final", ...} with the keys message, reasoning, request_id,
    finish_reason, usage and metrics.
    """
    client = make_client(endpoint=endpoint, model=model, timeout=timeout)
    conversation = Conversation(client, system=system, reasoning=reasoning, as_json=as_json)
    conversation.images += map(at_home, images or [])
    interactive = sys.stdin is not None and sys.stdin.isatty()
    # One loop for the whole conversation keeps the connection from answer to answer; it
    # runs only while there is an answer to wait for.
    loop = asyncio.new_event_loop()
    try:
        for line in _lines(interactive=interactive):
            try:
                _obey(loop, conversation, line)
            except MoondreamError as error:
                if not interactive:
                    raise
                note(str(error))
    finally:
        loop.run_until_complete(client.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class Conversation:
    """What was said so far."""

    def __init__(
        self,
        client: MoondreamClient,
        *,
        system: str | None,
        reasoning: bool | None,
        as_json: bool,
    ) -> None:
        self.images: list[str] = []  # for the next message
        self._client = client
        self._reasoning = reasoning
        self._as_json = as_json
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._messages: list[dict[str, Any]] = []

    def begin_anew(self) -> None:
        """Forget what was said."""
        self._messages = []
        self.images = []

    async def say(self, text: str) -> None:
        """Send a message and print the answer.

        What was answered when it is stopped stays in the conversation. A message that
        got no answer at all does not, so that it can be said again.
        """
        content = [text, *map(Path, self.images)] if self.images else text
        message = {"role": "user", "content": content}
        answer = ""
        try:
            async with self._client.chat(
                [*self._system, *self._messages, message], stream=True, reasoning=self._reasoning
            ) as stream:
                try:
                    await self._print(stream)
                finally:
                    answer = stream.text_so_far
        finally:
            if answer:
                self._messages += [message, {"role": "assistant", "content": answer}]
                self.images = []

    async def _print(self, stream: ChatStream) -> None:
        if self._as_json:
            await print_events(stream)
            names = ("reasoning", "request_id", "finish_reason", "usage", "metrics")
            about = {name: getattr(stream, name) for name in names}
            print_json({"event": "final", "message": stream.text_so_far} | about)
            return
        await print_pieces(stream)
        if stream.reasoning is not None:
            note(f"Reasoning: {stream.reasoning.text}")


def _obey(loop: asyncio.AbstractEventLoop, conversation: Conversation, line: str) -> None:
    """Do what a line asks for."""
    command, _, argument = line.partition(" ")
    if command == "/image" and argument:
        # Quoted as terminals do with what is dropped into them.
        path = at_home(argument.strip().strip("'\""))
        if Path(path).is_file():
            conversation.images.append(path)
            note(f"{path} goes with the next message.")
        else:
            note(f"There is no file {path}")
    elif command == "/new":
        conversation.begin_anew()
    elif command.startswith("/"):
        note(_HELP)
    elif line and not _run(loop, conversation.say(line)):
        note("Stopped.")


def _lines(*, interactive: bool) -> Iterator[str]:
    """Give what the user types, or the lines of another input, up to the end or ``/quit``."""
    if interactive:
        note(_HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - gives input() its editing keys and a history
    stopped = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if stopped or not interactive:
                raise
            stopped = True
            typer.echo()
            note("Ctrl-C once more, or Ctrl-D, leaves.")
            continue
        stopped = False
        if line in ("/quit", "/exit"):
            return
        yield line
    if interactive:
        typer.echo()


def _run(loop: asyncio.AbstractEventLoop, answer: Coroutine[Any, Any, None]) -> bool:
    """Run an answer; return whether it went to its end, and was not stopped by Ctrl-C."""
    task = loop.create_task(answer)
    try:
        with _ctrl_c_cancels(loop, task):
            loop.run_until_complete(task)
    except asyncio.CancelledError:
        return False
    except KeyboardInterrupt:  # where loops can't handle signals
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        return False
    return True


@contextlib.contextmanager
def _ctrl_c_cancels(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> Iterator[None]:
    try:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    except NotImplementedError:  # on Windows
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
