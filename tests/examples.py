"""What docstrings' examples find: `md`, the package, `asyncio`, and a server that needs no key."""

import asyncio

import pytest
from _pytest.doctest import DoctestItem

import moondream_async as md
from moondream_async.simulator import Simulator, SimulatorThread


@pytest.fixture(scope="module")  # and not of the session: its thread must not meet tests that fork
def examples_server():
    with SimulatorThread(Simulator(rate=0)) as server:
        yield server


@pytest.fixture(autouse=True)
def _examples(request, doctest_namespace, monkeypatch):
    if isinstance(request.node, DoctestItem):
        doctest_namespace.update(md=md, asyncio=asyncio)
        if any("run(" in example.source for example in request.node.dtest.examples):
            server = request.getfixturevalue("examples_server")
            monkeypatch.setenv("MOONDREAM_ENDPOINT", server.endpoint)
