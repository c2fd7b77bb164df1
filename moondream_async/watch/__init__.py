"""Moving pictures through one client: the newest frame wins.

`run` reads the frames and asks about them, `asking` makes the call about a frame, `items` has
the types of input and output, and `blocking` reads ordinary iterables in a thread, since they
may block.
"""

from __future__ import annotations

from .items import Frame, WatchResult
from .run import Watch

__all__ = ["Frame", "Watch", "WatchResult"]
