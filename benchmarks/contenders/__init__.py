"""The contenders: a module for each client, each with the same few names.

``NAME``: as the tables have it. ``NEEDS``: the distributions whose versions tell what was
measured. ``open(endpoint, connections)``: an asynchronous context manager around a
session, whose methods are the loops that a user of that client would write:

- ``caption(pieces)``, ``chat(pieces)``: read one stream to its end and append each piece
  of text to the list;
- ``call()``: one plain call with a small picture; returns the caption;
- ``bulk(paths, at_once)``: caption the files, and return the captions.

A client that blocks has ``BLOCKS = True``, and plain functions for all of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

OURS = "moondream"
RAW, FLOOR = "floor_raw", "floor_aiohttp"
ALL = (
    RAW,
    FLOOR,
    OURS,
    "aiohttp_plain",
    "httpx_sse",
    "httpx2_sse",
    "openai_default",
    "openai_aiohttp",
    "official_sdk",
    "huggingface",
)


def load(name: str) -> ModuleType:
    """Return the module of a contender; ImportError where its client is not installed."""
    return importlib.import_module(f".{name}", __package__)


def versions(module: ModuleType) -> dict[str, str]:
    """Return the versions of what is measured."""
    return {name: importlib.metadata.version(name) for name in module.NEEDS}
