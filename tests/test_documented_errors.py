"""Every error that is known of the wire, as a test each; the ids say from where.

They are the same names as in `test_documented`.
"""

from pathlib import Path

import pytest
from canned import canned
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md

# -- before anything was streamed ------------------------------------------------------

KINDS = {
    400: md.BadRequestError,
    401: md.AuthenticationError,
    403: md.PermissionDeniedError,
    404: md.NotFoundError,
    405: md.APIStatusError,
    413: md.PayloadTooLargeError,
    422: md.BadRequestError,
    429: md.RateLimitError,
    **dict.fromkeys((200, 500, 502, 503, 524), md.ServerError),
}
CAPTION = "docs skills/caption.md"
HTML = b"<!DOCTYPE html><title>api.moondream.ai | 502: Bad gateway</title>"
NOT_A_BOOLEAN = "Field 'stream' must be a boolean"
NO_SEGMENT = "Function 'segment' not available"
MISSING = [{"loc": ["body", "question"], "msg": "field required", "type": "missing"}]


def documented(kind):
    return {"error": {"message": "What happened", "type": kind, "param": "length", "code": kind}}


ERRORS = [
    (CAPTION, 400, documented("invalid_request"), "What happened"),
    (CAPTION, 401, documented("authentication_error"), "What happened"),
    (CAPTION, 413, documented("payload_too_large"), "What happened"),
    (CAPTION, 429, documented("rate_limit_exceeded"), "What happened"),
    (CAPTION, 500, documented("server_error"), "What happened"),
    ("seen models", 401, {"error": "Invalid API key"}, "Invalid API key"),
    ("seen gateway", 403, b"error code: 1010", "error code: 1010"),
    ("kestrel", 400, {"error": NOT_A_BOOLEAN}, NOT_A_BOOLEAN),
    ("kestrel", 503, {"error": "Engine is not ready"}, "Engine is not ready"),
    ("kestrel", 500, {"error": "Inference failed", "detail": "CUDA"}, "Inference failed: CUDA"),
    ("kestrel", 404, b"Not Found", "Not Found"),
    ("kestrel", 405, b"Method Not Allowed", "Method Not Allowed"),
    ("station", 200, {"error": "Queue is full", "status": "rejected"}, "Queue is full"),
    ("station", 200, {"error": "Request timeout", "status": "timeout"}, "Request timeout"),
    ("station", 200, {"error": "bad thing", "status": "error"}, "bad thing"),
    ("station", 200, {"error": NO_SEGMENT}, NO_SEGMENT),
    ("station", 503, {"detail": "Inference service not running"}, "Inference service not running"),
    ("station", 500, b"Internal Server Error", "Internal Server Error"),
    ("fastapi", 422, {"detail": MISSING}, "body.question: field required"),
    ("old", 400, {"error": "Query processing failed."}, "Query processing failed."),
    ("gateway", 502, HTML, "502: Bad gateway"),
    ("gateway", 524, HTML, "502: Bad gateway"),
]


@pytest.mark.parametrize(("source", "status", "body", "says"), ERRORS)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
async def test_error_is_read_as_documented(photo, source, status, body, *, says, stream):
    kind = "application/json" if isinstance(body, dict) else "text/plain"
    answer = whole(body, status=f"{status} Reason", kind="text/html" if body is HTML else kind)
    error = md.NotFoundError if says == NO_SEGMENT else KINDS[status]
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
