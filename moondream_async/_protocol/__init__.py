"""The wire, both ways and without I/O.

`requests` turns a call into JSON; `answers` turns a body or an error status into a value or
an error; `events` turns the bytes of a stream into events. All of them read every known server's
form without asking which server it is.
"""

from moondream_async._version import __version__

USER_AGENT = f"moondream-async/{__version__}"
"""Sent with each request: the cloud's gateway refuses clients that name none."""

MAX_BODY_BYTES = 64 * 1024 * 1024
"""Limit of a plain answer's body, which bounds memory. The largest answers hold a mask in base64
and stay far below."""
