"""The command ``chat``: a conversation in a terminal, with pictures."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moondream_async import ChatStream, MoondreamClient, MoondreamError

from . import _options as options
from ._output import EMPTY, note, print_events, print_json, print_pieces
from ._session import at_home
from ._words import in_words

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
    reasoning: options.Reasoning = None,
    as_json: options.AsJson = False,
    server: options.OfModel,
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
    client = server.client()
    conversation = Conversation(client, system=system, reasoning=reasoning, as_json=as_json)
    conversation.images += map(at_home, images or [])
    # Each is None where it is closed, and then input() can't ask.
    streams = (sys.stdin, sys.stdout, sys.stderr)
    interactive = None not in streams and sys.stdin.isatty()
    # One loop for the whole conversation keeps the connection from answer to answer; it
    # runs only while there is an answer to wait for.
    with asyncio.Runner() as runner:
        try:
            for line in _lines(interactive=interactive):
                try:
                    _obey(runner, conversation, line)
                except MoondreamError as error:
                    if not interactive:
                        raise
                    note(in_words(error))
        finally:
            runner.run(client.aclose())


class Conversation:
    """What was said so far, and the pictures that go with the next message."""

    def __init__(
        self,
        client: MoondreamClient,
        *,
        system: str | None,
        reasoning: bool | None,
        as_json: bool,
    ) -> None:
        self.images: list[str] = []
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

        An answer that is stopped stays in the conversation as far as it came. A message
        without any answer does not stay, so that it can be sent again.
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
        if not stream.text_so_far:
            note(EMPTY)


def _obey(runner: asyncio.Runner, conversation: Conversation, line: str) -> None:
    """Run a line that the user typed: a command, or a message. Ctrl-C stops an answer."""
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
    elif line:
        try:
            runner.run(conversation.say(line))
        except KeyboardInterrupt:
            note("Stopped.")


def _lines(*, interactive: bool) -> Iterator[str]:
    """Yield what the user types, or the lines of a pipe or file, up to the end or ``/quit``."""
    if interactive:
        note(_HELP)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - gives input() its editing keys and a history
    stopped = False
    while True:
        try:
            line = (input("> ") if interactive else _piped_line()).strip()
        except EOFError:
            break
        except UnicodeDecodeError as error:
            if not interactive:
                raise MoondreamError(f"What stdin gives is no text: {error}") from error
            note(f"That was no text: {error}")
            continue
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


def _piped_line() -> str:
    if sys.stdin is None:
        raise MoondreamError("Can't read stdin: it is closed")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
