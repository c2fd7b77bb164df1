"""Many pictures through one client, as fast as the server takes them.

`run` reads the items and asks about them, `control` finds how many requests the
server takes at once, and `items` says what goes in and what comes out.
"""

from __future__ import annotations

from .control import Control
from .items import Asking, BulkItem, BulkResult
from .run import BulkRun

__all__ = ["Asking", "BulkItem", "BulkResult", "BulkRun", "Control"]
