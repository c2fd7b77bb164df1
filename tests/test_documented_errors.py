"""Every error that is known of the wire, as a test each; the ids say from where.

They are the same names as in `test_documented`.
"""

from pathlib import Path

import pytest
from canned import canned
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md

# -- before anything was streamed ------------------------------------------------------

PLAIN_TEXT = "text/plain"
HTML = b"<!DOCTYPE html><title>api.moondream.ai | 502: Bad gateway</title>"


def documented(kind):
    return {"error": {"message": "What happened", "type": kind, "param": "length", "code": kind}}


ERRORS = {
    "docs skills/caption.md 400": (
        400,
        documented("invalid_request"),
        md.BadRequestError,
        "What happened",
    ),
    "docs skills/caption.md 401": (
        401,
        documented("authentication_error"),
        md.AuthenticationError,
        "What happened",
    ),
    "docs skills/caption.md 413": (
        413,
        documented("payload_too_large"),
        md.PayloadTooLargeError,
        "What happened",
    ),
    "docs skills/caption.md 429": (
        429,
        documented("rate_limit_exceeded"),
        md.RateLimitError,
        "What happened",
    ),
    "docs skills/caption.md 500": (
        500,
        documented("server_error"),
        md.ServerError,
        "What happened",
    ),
    "seen models 401": (
        401,
        {"error": "Invalid API key"},
        md.AuthenticationError,
        "Invalid API key",
    ),
    "seen gateway 403": (403, b"error code: 1010", md.PermissionDeniedError, "error code: 1010"),
    "kestrel 400": (
        400,
        {"error": "Field 'stream' must be a boolean"},
        md.BadRequestError,
        "Field 'stream' must be a boolean",
    ),
    "kestrel 503": (503, {"error": "Engine is not ready"}, md.ServerError, "Engine is not ready"),
    "kestrel 500": (
        500,
        {"error": "Inference failed", "detail": "CUDA out of memory"},
        md.ServerError,
        "Inference failed: CUDA out of memory",
    ),
    "kestrel 404": (404, b"Not Found", md.NotFoundError, "Not Found"),
    "kestrel 405": (405, b"Method Not Allowed", md.APIStatusError, "Method Not Allowed"),
    "station 200, rejected": (
        200,
        {"error": "Queue is full", "status": "rejected"},
        md.ServerError,
        "Queue is full",
    ),
    "station 200, timeout": (
        200,
        {"error": "Request timeout", "status": "timeout"},
        md.ServerError,
        "Request timeout",
    ),
    "station 200, error": (
        200,
        {"error": "bad thing", "status": "error"},
        md.ServerError,
        "bad thing",
    ),
    "station 200, no such function": (
        200,
        {"error": "Function 'segment' not available"},
        md.NotFoundError,
        "Function 'segment' not available",
    ),
    "station 503": (
        503,
        {"detail": "Inference service not running"},
        md.ServerError,
        "Inference service not running",
    ),
    "station 500": (500, b"Internal Server Error", md.ServerError, "Internal Server Error"),
    "fastapi 422": (
        422,
        {"detail": [{"loc": ["body", "question"], "msg": "field required", "type": "missing"}]},
        md.BadRequestError,
        "body.question: field required",
    ),
    "old 400": (
        400,
        {"error": "Query processing failed."},
        md.BadRequestError,
        "Query processing failed.",
    ),
    "gateway 502": (502, HTML, md.ServerError, "502: Bad gateway"),
    "gateway 524": (524, HTML, md.ServerError, "502: Bad gateway"),
}


@pytest.mark.parametrize(("status", "body", "error", "says"), ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_error_is_read_as_documented(photo, status, body, error, *, says, stream):
    kind = "application/json" if isinstance(body, dict) else PLAIN_TEXT
    answer = whole(body, status=f"{status} Reason", kind="text/html" if body is HTML else kind)
    async with canned(answer, max_retries=0) as (client, _):
        with pytest.raises(error) as caught:
            await client.query(photo, "What?", stream=stream)
    assert type(caught.value) is error
    assert says in caught.value.message
    assert caught.value.status == status
    assert caught.value.body == (body if isinstance(body, dict) else body.decode())


@pytest.mark.parametrize("kind", ["invalid_request", "authentication_error", "rate_limit_exceeded"])
async def test_error_of_the_cloud_has_its_words(photo, kind):
    """docs skills/caption.md, and types from the tests of a client in Dart."""
    async with canned(whole(documented(kind), status="418 Reason")) as (client, _):
        with pytest.raises(md.APIStatusError, match="What happened") as caught:
            await client.caption(photo)
    assert (caught.value.type, caught.value.code, caught.value.param) == (kind, kind, "length")


# -- within a stream ------------------------------------------------------------------

DOCUMENTED = Path(__file__).parent / "documented"  # with the source in each file
BROKEN_STREAMS = {
    "old_caption_failed": (md.StreamServerError, "An error occurred during caption generation."),
    "old_query_failed": (md.StreamServerError, "An error occurred during query processing."),
    "node_error": (md.StreamServerError, "Out of memory"),
    "kestrel_failed": (md.StreamInterruptedError, "before the answer was complete"),
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
@pytest.mark.parametrize("ended", [True, False], ids=["in good order", "without the last chunk"])
async def test_stream_that_fails_as_servers_do_raises(photo, name, ended):
    error, says = BROKEN_STREAMS[name]
    data = (DOCUMENTED / f"{name}.sse").read_bytes()
    async with canned(STREAM_HEAD + in_chunks(data, end=ended)) as (client, _):
        stream = await client.query(photo, "What?", stream=True)
        with pytest.raises(error, match=says) as caught:
            await stream.text()
    assert caught.value.partial == "A "
