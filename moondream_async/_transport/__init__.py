"""Connections: a pool for each event loop, requests out, bodies in.

No other room of the package imports aiohttp's client. Exceptions of aiohttp are translated into
this package's errors (`faults`), with the original as the cause. `pools` holds the connections,
`uploads` writes the bodies of requests, `bodies` reads the bodies of answers, and `fetching`
fetches pictures from the web.
"""
