"""The demo page: a local page to ask about a picture and watch the answer being written.

What belongs here is the page and what serves it, and nothing that others build on:

- `server` listens on loopback and answers the page's questions with a client's streams;
- `guard` decides who may talk to it, and says so to the browser;
- `asking` turns a question of the page into a call;
- ``static/`` is the page itself: HTML, CSS and JavaScript as they are sent. There is no
  build step, and nothing comes from another host.

It is also the example of a web backend: a stream of the client's, passed on as it comes,
and closed at once when the reader goes away.
"""

from __future__ import annotations

from .server import DemoPage

__all__ = ["DemoPage"]
