"""The private names of aiohttp and asyncio that `_transport/private.py` uses are still there.

Whoever sees one of these fail has a new version that has moved it, and mends that module.
"""

import asyncio
import inspect

import aiohttp
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
