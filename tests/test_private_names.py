"""The private names of aiohttp and asyncio that `_transport/private.py` uses are still there.

Whoever sees one of these fail has a new version that has moved it, and mends that module.
"""

import ast
import asyncio
import inspect
from pathlib import Path

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from canned import IMAGE
from raw_server import RawServer, answer_all

import moondream_async as md
from moondream_async._transport import private


async def test_aiohttp_still_has_what_is_used_of_it():
    connector = aiohttp.TCPConnector()
    for name in ("_factory", "_conns", "_acquired", "_close", "_loop"):
        assert hasattr(connector, name), f"aiohttp has moved TCPConnector.{name}"
    await connector.close()
    async with aiohttp.ClientSession() as session:
        assert hasattr(session, "_middlewares"), "aiohttp has moved ClientSession._middlewares"
    request = inspect.signature(aiohttp.ClientRequest.__init__).parameters
    assert "proxy_headers" in request, "aiohttp has moved ClientRequest.proxy_headers"
    for name in ("set_response_params", "data_received", "feed_data", "force_close"):
        assert hasattr(ResponseHandler, name), f"aiohttp has moved ResponseHandler.{name}"
    assert hasattr(aiohttp.StreamReader, "_read_nowait"), "aiohttp has moved _read_nowait"


async def test_connections_are_made_with_our_protocol_and_asyncio_shows_their_sockets():
    async with (
        RawServer(answer_all) as server,
        md.MoondreamClient(endpoint=server.endpoint) as client,
    ):
        await client.caption(IMAGE)
        (pool,) = client._caller.session.transport._pools.values()
        (protocol,) = private.protocols(pool._session.connector)
        assert type(protocol) is private.Protocol, "aiohttp has moved TCPConnector._factory"
        assert protocol._answer is not None, "aiohttp feeds answers in another way"
        assert protocol._answer.is_eof()
        assert private.count_idle(pool._session.connector) == 1
        for name in ("_sock", "_conn_lost", "_closing"):
            assert hasattr(protocol.transport, name), f"asyncio has moved {name} of transports"
        loop = asyncio.get_running_loop()
        for name in ("_remove_reader", "_remove_writer"):
            assert hasattr(loop, name), f"asyncio has moved {name} of selector loops"


@pytest.mark.slow
def test_nothing_else_uses_private_names_of_other_libraries():
    """A private name is of ours where some module of ours defines or sets it."""
    package = Path(md.__file__).parent
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    ours = {"_fields", "_asdict", "_replace", "_getframe"}  # these are public
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                ours.add(node.name)
            elif isinstance(node, ast.Name):
                ours.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                ours.add(node.attr)
    foreign = {
        f"{path.relative_to(package)}: {node.attr}"
        for path, tree in trees.items()
        if path.name != "private.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ours
    }

    assert foreign == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anyio", "aiohttp", "asyncio"])
def test_no_private_module_is_imported_but_where_its_reason_is_given(name):
    package = Path(md.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith((f"import {name}._", f"from {name}._"))
    }

    assert found <= {"_transport/private.py"}
