"""What servers write about requests that are none: nothing.

Anybody can send what is not HTTP, or hang up in the middle. aiohttp answers it well, and then
writes a traceback, as if it were this program's fault.
"""

from __future__ import annotations

import logging

from aiohttp import web

_PARSER = "aiohttp.http_exceptions"  # whose errors are those of a request, and no others


class _OthersFaults(logging.Filter):
    """Lets a record through but for the senders' own faults."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether it is worth writing."""
        error = record.exc_info[1] if record.exc_info else None
        is_gone = isinstance(error, web.RequestPayloadError | ConnectionError)
        if not is_gone and type(error).__module__ != _PARSER:
            return True
        logger.debug("%s: %s", record.getMessage(), type(error).__name__)
        return False


logger = logging.getLogger("moondream_async.server")
"""For aiohttp's servers: what they write goes on to whoever listens, less the senders' faults."""
logger.addFilter(_OthersFaults())
