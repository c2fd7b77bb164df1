"""Moving pictures through one client: the newest frame wins.

`run` reads the frames and asks about them, `asking` says what is asked about one,
`items` what goes in and what comes out, and `blocking` reads ordinary iterables,
which may block, in a thread.
"""

from __future__ import annotations

from .items import Frame, WatchResult
from .run import Watch

__all__ = ["Frame", "Watch", "WatchResult"]
