"""The wire, both ways and without I/O.

`requests` turns a call into JSON; `answers` turns a body or an error status
into a value or an error; `events` does so for a stream. Which of the known
servers speaks is never asked: what they send differs, what it means does not.
"""

from moondream_async._version import __version__

USER_AGENT = f"moondream-async/{__version__}"
"""Must be there: the cloud's gateway turns away clients without a name of their own."""

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Far above any answer: the largest hold a mask in base64. Beyond it somebody is at play."""
