"""Many pictures through one client, as fast as the server takes them.

`run` reads the items and makes their calls, `control` finds how many requests the server takes,
and `items` has the types of items and results.
"""

from __future__ import annotations

from .control import Control
from .items import Asking, BulkItem, BulkResult
from .run import BulkRun

__all__ = ["Asking", "BulkItem", "BulkResult", "BulkRun", "Control"]
