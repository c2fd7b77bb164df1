"""httpx2, the successor of httpx, with httpx-sse, which takes its client as well."""

import httpx2

from . import httpx_sse

NAME = "httpx2 + httpx-sse"
NEEDS = ("httpx2", "httpx-sse")


def open(endpoint, connections):  # noqa: A001 - as the others
    return httpx_sse.open(endpoint, connections, httpx2)
