"""Error messages of the library in words of the command line: options and variables."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

from moondream_async.errors import (
    APIConnectionError,
    ImageError,
    MoondreamError,
    RequestError,
)

NAME = "moondream-async"

_NO_KEY = (
    "Moondream Cloud needs an API key: set MOONDREAM_API_KEY. Or name another server with "
    "--endpoint or MOONDREAM_ENDPOINT ('{0} serve' starts one for trials). Or try: {0} demo"
)
_EMPTY = r"must be a string that is not empty, not '\s*'"

_IN_OTHER_WORDS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^Moondream Cloud needs an API key\..*", lambda _: _NO_KEY.format(own_name())),
    (r"^api_key must be", "MOONDREAM_API_KEY must be"),
    (r"^endpoint must be", "--endpoint, or MOONDREAM_ENDPOINT, must be"),
    (r"Use https, or pass insecure_hosts=.*", "Use https, or unset MOONDREAM_API_KEY."),
    (rf"^(question|object) {_EMPTY}", lambda found: f"{found[1].upper()} must not be empty"),
    (r"^model must be .*, not '\s*'$", "--model must not be empty"),
    (r"\bsettings\['(\w+)'\]", lambda found: f"--{found[1].replace('_', '-')}"),
    (r"\bTimeout\.total\b", "--timeout"),
    (r"\bPass proxy=False\b", "Unset it"),
]
_LOCAL = ("127.0.0.1", "localhost", "::1")
_STATION_PORT = 2020


def in_words(error: MoondreamError) -> str:
    """Return an error's message with options and variables in place of Python's arguments.

    >>> in_words(RequestError("endpoint must be an http or https address, not 'x'"))
    "--endpoint, or MOONDREAM_ENDPOINT, must be an http or https address, not 'x'"
    """
    message = str(error)
    if isinstance(error, RequestError) and not isinstance(error, ImageError):
        for pattern, words in _IN_OTHER_WORDS:
            message = re.sub(pattern, words, message, flags=re.DOTALL)
    elif isinstance(error, APIConnectionError):
        message += _what_starts_one(message)
    return limits_in_words(message)


def limits_in_words(message: str) -> str:
    """Return a message with the option that sets a limit in place of `Timeout`'s field.

    >>> limits_in_words("Not complete within 1 seconds (Timeout.total)")
    'Not complete within 1 seconds (--timeout)'
    """
    message = re.sub(r"\(Timeout\.(total|first_event|idle)\)", "(--timeout)", message)
    return re.sub(r" \(Timeout\.\w+\)", "", message)  # no option sets these


def own_name() -> str:
    """Return the name that starts this program; a path, where the shell would not find it."""
    called = sys.argv[0]
    if os.path.basename(called) == NAME and os.path.dirname(called):  # noqa: PTH119, PTH120 - as typed
        found = shutil.which(NAME)
        if found is None or not os.path.samefile(found, called):  # noqa: PTH121 - likewise
            return called
    return NAME


def _what_starts_one(message: str) -> str:
    """Return a hint how to start a server, where nothing listens on this machine."""
    found = re.search(r"^Could not connect to (http\S+?):? (?!\[SSL)", message)
    if found is None:
        return ""
    address = urlsplit(found[1])
    if address.hostname not in _LOCAL:
        return ""
    port = "" if address.port in (None, _STATION_PORT) else f" --port {address.port}"
    return f". Is the server running? One for trials: {own_name()} serve{port}"
