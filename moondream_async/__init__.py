"""Asyncio-first streaming client for the Moondream vision API."""

from typing import TYPE_CHECKING, Any

from ._client import MoondreamClient, photon, vl
from ._ft import FinetuneClient, ft
from ._stream.call import StreamCall
from ._stream.interruptible import interruptible
from ._stream.kinds import CaptionStream, ChatStream, QueryStream, SegmentStream
from ._stream.relay import EventStream
from ._stream.stream import Stream
from ._transport.fetch import fetch_image
from ._version import __version__
from .batch.records import Batch, BatchFailure, BatchOutput, BatchProgress, BatchResult, BatchUsage
from .batch.wire import BatchRequest
from .errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ClientClosedError,
    ImageError,
    MissingExtraError,
    MoondreamError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RequestError,
    ServerError,
    StreamError,
    StreamInterruptedError,
    StreamProtocolError,
    StreamServerError,
    StreamStalledError,
)
from .results import (
    BboxEvent,
    CaptionResult,
    ChatMessage,
    ChatResult,
    ChunkEvent,
    ClientStats,
    DetectResult,
    FinalEvent,
    Grounding,
    Health,
    MetricsEvent,
    Model,
    Point,
    PointResult,
    QueryResult,
    Reasoning,
    ReasoningEvent,
    Region,
    Result,
    SegmentResult,
    ServerStats,
    StreamEvent,
    UnknownEvent,
    Usage,
)
from .tuning.records import (
    Checkpoint,
    CheckpointDownload,
    Finetune,
    MetricsLog,
    Rollout,
    RolloutOutput,
    Rollouts,
    TrainStep,
)
from .tuning.wire import TrainGroup, TuningRequest
from .types import SAMPLE_IMAGE, CallEvent, EncodedImage, Hooks, ImageInput, Settings, Timeout

if TYPE_CHECKING:
    from .batch.batches import Batches
    from .bulk import BulkItem, BulkResult, BulkRun
    from .tuning.finetunes import Tuning
    from .watch.items import Frame, WatchResult
    from .watch.run import Watch

__docformat__ = "google"  # of docstrings, for pdoc

__all__ = [
    "SAMPLE_IMAGE",
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "Batch",
    "BatchFailure",
    "BatchOutput",
    "BatchProgress",
    "BatchRequest",
    "BatchResult",
    "BatchUsage",
    "Batches",
    "BboxEvent",
    "BulkItem",
    "BulkResult",
    "BulkRun",
    "CallEvent",
    "CaptionResult",
    "CaptionStream",
    "ChatMessage",
    "ChatResult",
    "ChatStream",
    "Checkpoint",
    "CheckpointDownload",
    "ChunkEvent",
    "ClientClosedError",
    "ClientStats",
    "DetectResult",
    "EncodedImage",
    "EventStream",
    "FinalEvent",
    "Finetune",
    "FinetuneClient",
    "Frame",
    "Grounding",
    "Health",
    "Hooks",
    "ImageError",
    "ImageInput",
    "MetricsEvent",
    "MetricsLog",
    "MissingExtraError",
    "Model",
    "MoondreamClient",
    "MoondreamError",
    "NotFoundError",
    "PayloadTooLargeError",
    "PermissionDeniedError",
    "Point",
    "PointResult",
    "QueryResult",
    "QueryStream",
    "RateLimitError",
    "Reasoning",
    "ReasoningEvent",
    "Region",
    "RequestError",
    "Result",
    "Rollout",
    "RolloutOutput",
    "Rollouts",
    "SegmentResult",
    "SegmentStream",
    "ServerError",
    "ServerStats",
    "Settings",
    "Stream",
    "StreamCall",
    "StreamError",
    "StreamEvent",
    "StreamInterruptedError",
    "StreamProtocolError",
    "StreamServerError",
    "StreamStalledError",
    "Timeout",
    "TrainGroup",
    "TrainStep",
    "Tuning",
    "TuningRequest",
    "UnknownEvent",
    "Usage",
    "Watch",
    "WatchResult",
    "__version__",
    "fetch_image",
    "ft",
    "interruptible",
    "photon",
    "vl",
]


def __getattr__(name: str) -> Any:
    """Load what needs anyio when somebody asks for it, so that importing the package is light."""
    if name in ("BulkItem", "BulkResult", "BulkRun"):
        from . import bulk  # noqa: PLC0415

        value = getattr(bulk, name)
    elif name == "Batches":
        from .batch import batches  # noqa: PLC0415

        value = batches.Batches
    elif name == "Tuning":
        from .tuning import finetunes  # noqa: PLC0415

        value = finetunes.Tuning
    elif name in ("Frame", "Watch", "WatchResult"):
        from . import watch  # noqa: PLC0415

        value = getattr(watch, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # for next time, and for tools that look at the module's names
    return value
