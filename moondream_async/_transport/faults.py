"""The exceptions that aiohttp raises, translated into ours."""

from __future__ import annotations

import asyncio
import errno
import os
import re
from typing import TYPE_CHECKING

import aiohttp

from moondream_async.errors import APIConnectionError, MoondreamError

if TYPE_CHECKING:
    from yarl import URL

# aiohttp's readers raise RuntimeError if the connection is lost before they begin to wait.
FAULTS = (aiohttp.ClientError, OSError, RuntimeError, asyncio.IncompleteReadError)

# ValueError: some invalid addresses are found only when they are looked up or written.
FAULTS_OF_SENDING = (*FAULTS, ValueError)

_REFUSED = re.compile(r"\[Errno (\d+)\] Connect call failed \([^)]*\)")


def is_disconnect(error: BaseException) -> bool:
    """Tell whether an error means that the other side had closed a connection."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return True
    # A read raises the error itself; aiohttp wraps the error of a write, mostly without errno.
    return any(
        isinstance(each, ConnectionError)
        or (isinstance(each, OSError) and each.errno in (errno.ECONNRESET, errno.EPIPE))
        for each in (error, error.__cause__)
    )


def translate(error: BaseException, url: URL) -> MoondreamError:
    """Turn an exception that aiohttp raised before the answer into an error of ours."""
    where = str(url.origin())
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return APIConnectionError(
            f"The certificate of {where} can't be trusted: {say(error.certificate_error)}",
            permanent=True,
        )
    if isinstance(error, ValueError):  # aiohttp.InvalidURL is one
        return APIConnectionError(f"{where} is no valid address: {say(error)}", permanent=True)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return APIConnectionError(
            f"The proxy refused the connection to {where}: {error.status} {error.message}"
        )
    if isinstance(error, aiohttp.ClientConnectorError):
        return APIConnectionError(f"Could not connect to {where}: {say(error.os_error)}")
    if isinstance(error, aiohttp.ClientResponseError):
        return _translate_answer(error, where)
    return APIConnectionError(f"The connection to {where} was lost: {say(error)}")


def _translate_answer(error: aiohttp.ClientResponseError, where: str) -> MoondreamError:
    _, encoded, encoding = error.message.partition("content-encoding: ")
    if encoded:
        kind = one_line(encoding).partition(".")[0]
        return APIConnectionError(
            f"{where} sent its answer compressed ({kind}), though it was asked not to, and this "
            "client can't decode that",
            permanent=True,
        )
    return APIConnectionError(f"What {where} answered is not HTTP: {one_line(error.message)}")


def say(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed it"  # its own message may be the bytes that had arrived
    # asyncio's message repeats the address, and has a number in place of its meaning.
    said = _REFUSED.sub(lambda found: os.strerror(int(found[1])), one_line(str(error)))
    return said or type(error).__name__


def one_line(text: str) -> str:
    """Return the first line, which holds the finding of aiohttp's parser."""
    return text.strip().partition("\n")[0].rstrip(":")
