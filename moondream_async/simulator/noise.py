"""A logger for aiohttp's servers that is silent about malformed requests.

Any client can send bytes that are not HTTP, or hang up in the middle of a body. aiohttp
answers such a client well, and then logs a traceback as if this program were at fault.
"""

from __future__ import annotations

import logging

from aiohttp import web

_PARSER = "aiohttp.http_exceptions"  # the module whose errors are faults of a request


class _ClientsFaults(logging.Filter):
    """Drops records about faults of clients, and logs a line on each at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record stays."""
        error = record.exc_info[1] if record.exc_info else None
        is_gone = isinstance(error, web.RequestPayloadError | ConnectionError)
        if not is_gone and type(error).__module__ != _PARSER:
            return True
        logger.debug("%s: %s", record.getMessage(), type(error).__name__)
        return False


logger = logging.getLogger("moondream_async.server")
logger.addFilter(_ClientsFaults())
