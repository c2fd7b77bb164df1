"""The demo page: a local page to ask about a picture and watch the answer being written.

- `server` listens on loopback and answers the page's questions with a client's streams;
- `guard` refuses requests that do not come from the page;
- `asking` turns a question of the page into a call;
- ``static/`` is the page itself: HTML, CSS and JavaScript as they are sent. There is no
  build step, and nothing comes from another host.

The server is also an example of a web backend: it relays a stream of the client chunk by
chunk, and closes the stream at once when the reader goes away.
"""

from __future__ import annotations

from .server import DemoPage

__all__ = ["DemoPage"]
