"""Connections: a pool for each event loop, requests out, bodies in.

Alone in this package it imports aiohttp's client, and nothing of aiohttp leaves
it: what goes wrong is translated (`faults`) into this package's errors, with the
original as the cause. `pools` holds the connections, `uploads` writes a request's
body, `bodies` reads an answer's, and `fetching` is for pictures from the web.
"""
