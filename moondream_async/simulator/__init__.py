"""A server that speaks the Moondream API, for demos and tests. It runs no model.

The server describes what can be measured in the picture of a request: its format, size,
brightness and main colours, and where the colours lie. So every answer depends on the
pixels that arrived, and the same picture and question give the same answer, streamed
or not::

    async with Simulator() as simulator:
        async with MoondreamClient(endpoint=simulator.endpoint) as client:
            result = await client.caption(SAMPLE_IMAGE)

The server fails on request, in any way a server can: see `Fault`; and it gives the answers
that a test wants: see `Script`.
"""

from __future__ import annotations

from moondream_async.types import SAMPLE_IMAGE

from .dialects import DIALECTS
from .faults import Fault, FaultQueue, describe_faults
from .received import Connections, ReceivedRequest
from .script import Script, ScriptedAnswer
from .server import Simulator
from .thread import SimulatorThread

__all__ = [
    "DIALECTS",
    "SAMPLE_IMAGE",
    "Connections",
    "Fault",
    "FaultQueue",
    "ReceivedRequest",
    "Script",
    "ScriptedAnswer",
    "Simulator",
    "SimulatorThread",
    "describe_faults",
]
