"""Plain answers: bodies into results, and whatever a server calls an error into an error.

Where a body comes from stands beside it, in the names of `test_documented.py`.
"""

import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import moondream_async as md
from moondream_async._protocol import decoding
from moondream_async._protocol.answers import (
    decode_json,
    decode_reasoning,
    describe,
    error_from_response,
    read_models,
    read_result,
    read_stats,
)
from moondream_async.errors import APIStatusError, MoondreamError, NotFoundError, ServerError
from moondream_async.results import Grounding, Reasoning

SKILLS = ["caption", "query", "detect", "point", "segment", "chat"]


def decode(skill, body):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return read_result(skill, decode_json(body))


# -- results -------------------------------------------------------------------------------

BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}
GROUNDED = {
    "text": "One blue boat.",
    "grounding": [{"start_idx": 4, "end_idx": 13, "points": [[0.25, 0.75]]}],
}
METRICS = {"input_tokens": 735, "output_tokens": 45, "prefill_time_ms": 20.1, "ttft_ms": 21.0}
STATION_STATS = {"tokens": 2, "duration": 0.5, "tokens_per_sec": 4.0}
SAID_BY_CLOUD = {"request_id": "2025-03-25_caption_1", "metrics": METRICS, "finish_reason": "stop"}
GREETING = {"role": "assistant", "content": "Hi."}
REASONED = {**GREETING, "reasoning": "A greeting."}
THOUGHT_OF = {**GREETING, "reasoning": GROUNDED["text"]}
DETAILS = {"grounding": GROUNDED["grounding"]}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}

# The skill, the body, and of the result what stands elsewhere in the body or says None there.
ANSWERS = {
    "docs caption.md": ("caption", {"caption": "A scene.", **SAID_BY_CLOUD}, {}),
    "Station caption": (
        "caption",
        {"caption": "A scene.", "_stats": STATION_STATS},
        {"metrics": STATION_STATS},
    ),
    "old caption": ("caption", {"caption": "A scene."}, {}),
    "docs query.md": ("query", {"answer": "Two.", "request_id": "r"}, {}),
    "docs query.md, reasoning": ("query", {"answer": "Two.", "reasoning": GROUNDED}, {}),
    "kestrel query": (
        "query",
        {"request_id": "42", "finish_reason": "length", "answer": "Two", "metrics": METRICS},
        {},
    ),
    "query, reasoning under the name of chat": (
        "query",
        {"answer": "Two.", "reasoning": None, "reasoning_content": GROUNDED},
        {"reasoning": GROUNDED},
    ),
    "a reason that is a number": (
        "caption",
        {"caption": "", "finish_reason": 0},
        {"finish_reason": "0"},
    ),
    "an id that is a number": ("caption", {"caption": "", "request_id": 42}, {"request_id": "42"}),
    "no id": ("caption", {"caption": "", "request_id": ""}, {"request_id": None}),
    "an id that is none": ("caption", {"caption": "", "request_id": True}, {"request_id": None}),
    **{
        f"an error that is {nothing!r}": ("caption", {"caption": "", "error": nothing}, {})
        for nothing in (None, "", False, 0, {}, [])
    },
    "an empty answer": ("query", {"answer": ""}, {}),
    "docs detect.md": (
        "detect",
        {"request_id": "r", "objects": [BOX, {"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]},
        {},
    ),
    "detect, none there": ("detect", {"objects": []}, {}),
    "docs point.md": ("point", {"request_id": "r", "points": [{"x": 0.25, "y": 1}]}, {}),
    "Station point": ("point", {"points": [{"x": 0.25, "y": 0.5}], "count": 1}, {}),
    "docs segment.md": ("segment", {"path": "M 0 0.5 Z", "bbox": BOX, "request_id": "r"}, {}),
    "kestrel segment, no box": (
        "segment",
        {"path": "", "bbox": None, "parse_error": "no box", "finish_reason": "stop"},
        {},
    ),
    "kestrel segment, no outline": (
        "segment",
        {"path": None, "parse_error": "odd token"},
        {"path": ""},
    ),
    "kestrel segment, return_base64": (
        "segment",
        {"path": "M 0 0 Z", "bbox": BOX, "coarse_path": "M 0 0", "refined_mask_base64": "AA=="},
        {},
    ),
    "docs openai.md": (
        "chat",
        {
            "id": "c-1",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": REASONED, "finish_reason": "stop"}],
            "usage": USAGE,
        },
        {"message": REASONED, "finish_reason": "stop", "request_id": "c-1"},
    ),
    "SDK chat, reasoning_details": (
        "chat",
        {"choices": [{"message": {**THOUGHT_OF, "reasoning_details": DETAILS}}]},
        {"message": {**THOUGHT_OF, "reasoning_details": GROUNDED}},
    ),
    "chat, whose details have the text": (
        "chat",
        {"choices": [{"message": {"content": "Hi.", "reasoning_details": GROUNDED}}]},
        {"message": {**THOUGHT_OF, "reasoning_details": GROUNDED}},
    ),
}


def test_every_servers_body_becomes_the_result_that_it_means():
    for name, (skill, body, elsewhere) in ANSWERS.items():
        decoded = decode(skill, body)
        known = body.keys() & type(decoded).fields()

        assert type(decoded).__name__ == f"{skill.title()}Result"
        said = {key: body[key] for key in known if body[key] is not None} | elsewhere
        assert decoded == {key: value for key, value in said.items() if value is not None}, name
        assert decoded.raw == body


SPANS = [  # of which those that make no sense are left out
    {"start_idx": 0, "end_idx": 1, "points": []},
    {"start_idx": "0", "end_idx": 1, "points": []},
    "odd",
    {"start_idx": 2, "end_idx": 3, "points": [[0.5]]},
]


def test_reasoning_comes_in_several_shapes():
    for value, reasoning in (
        (None, None),
        ("Count them.", Reasoning("Count them.")),
        ({"text": "Count them."}, Reasoning("Count them.")),
        ({"text": None}, Reasoning("")),
        ({"text": "x", "grounding": None}, Reasoning("x")),
        (
            {"text": "x", "grounding": SPANS},
            Reasoning("x", (Grounding(0, 1), Grounding(2, 3, [[0.5]]))),
        ),
        (["Count", "them."], None),
        (5, None),
    ):
        assert decode_reasoning(value) == reasoning
        assert decode("query", {"answer": "two", "reasoning": value}).reasoning == reasoning


NO_ANSWERS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b'"text"',
    b"5",
    b"<html>Welcome</html>",
    b'{"caption": ',
    b'{"caption": null, "answer": 5, "objects": {}, "points": [[1]], "path": [], "choices": 1}',
    b'{"objects": [{"x_min": 0.1}], "points": [{"x": "0.1", "y": 0.2}]}',
    b'{"choices": []}',
    b'{"choices": [5]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": "Two."}]}',
    b'{"choices": [{"message": {"content": ["Two."]}}]}',
    b"\xff\xfe",
    b'{"caption": "\xff", "answer": "\xff"}',
]


def test_a_body_without_the_answer_is_a_server_error_that_shows_it():
    for body in NO_ANSWERS:
        for skill in SKILLS:
            with pytest.raises(ServerError, match=r"^The server's reply ") as caught:
                decode(skill, body)
            assert caught.value.status == 200, skill


# -- models and statistics -----------------------------------------------------------------


MODEL = {"id": "md2", "name": "Moondream 2", "description": "a model", "version": "1"}
SEEN_LIVE = {"object": "list", "data": [{"id": "moondream3-preview", "owned_by": "someone"}]}


def test_models_are_listed_by_every_server():
    for body, models in (
        (SEEN_LIVE, [{"id": "moondream3-preview"}]),
        ({"models": [MODEL]}, [MODEL]),  # of Station
        ({"data": [{"id": 5}, {"id": None}, "odd", {}]}, [{"id": "5"}]),
        ({"data": None, "models": 5}, []),
        ({}, []),
    ):
        assert read_models(body) == models
    [model] = read_models(SEEN_LIVE)
    assert model.raw["owned_by"] == "someone"


def test_stations_numbers_are_read_and_kept():
    running = {"workers": 1, "queue_size": 0, "default_timeout": 30.0, "status": "running"}
    stopped = {"status": "stopped", "requests_processed": 3}
    for raw, known in (
        ({**running, "new": 5}, running),
        ({**stopped, "mine": [1]}, stopped),
        ({"workers": "many"}, {}),
    ):
        stats = read_stats(raw)
        assert stats == known
        assert stats.raw == raw


# -- errors --------------------------------------------------------------------------------

# With the kind and the words that the cloud documents, where they are its.
SAID = {"message": "What happened", "type": "invalid_request", "param": "length", "code": "c"}
MISSING = [{"loc": ["body", "question"], "msg": "field required", "type": "x"}, {"msg": "y"}]
HTML = b"<html>\n<title>502: Bad gateway</title>\n</html>"
ERRORS = [
    ("docs caption.md", 400, {"error": SAID}, "What happened", SAID),
    ("seen models", 401, {"error": "Invalid API key"}, "Invalid API key", {"type": None}),
    ("seen gateway", 403, b"error code: 1010", "error code: 1010", {"body": "error code: 1010"}),
    ("kestrel", 503, {"error": "Not ready", "detail": "CUDA"}, "Not ready: CUDA", {}),
    ("kestrel", 404, b"Not Found", "Not Found", {}),
    ("station", 503, {"detail": "Service not running"}, "Service not running", {}),
    ("station", 500, b"Internal Server Error", "Internal Server Error", {}),
    ("fastapi", 422, {"detail": MISSING}, "body.question: field required; y", {}),
    ("old", 400, {"error": "Query failed."}, "Query failed.", {"body": {"error": "Query failed."}}),
    ("gateway", 502, HTML, "<html> <title>502: Bad gateway</title> </html>", {}),
    ("odd", 429, {"error": {"message": "Slow"}, "request_id": 7}, "Slow", {"request_id": "7"}),
    ("odd", 413, b"", "HTTP status 413: an empty body", {}),
    ("odd", 500, {"why": 5}, 'HTTP status 500: {"why": 5}', {}),
    ("odd", 500, {"message": "boom"}, "boom", {}),
    ("odd", 500, {"error": {"type": "overloaded"}}, "overloaded", {}),
    ("odd", 500, {"error": {"why": 5}}, '{"why":5}', {}),
    ("odd", 500, {"error": 5}, "5", {}),
    ("odd", 500, [1, 2], "[1,2]", {}),
]


def test_every_shape_of_an_error_is_said_in_a_line():
    for source, status, body, message, fields in ERRORS:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        error = error_from_response(status, {}, data, now=0)

        assert (error.status, error.message) == (status, message), source
        assert {name: getattr(error, name) for name in fields} == fields


KINDS = {
    md.BadRequestError: (400, 422),
    md.AuthenticationError: (401,),
    md.PermissionDeniedError: (403,),
    md.NotFoundError: (404,),
    md.PayloadTooLargeError: (413,),
    md.RateLimitError: (429,),
    APIStatusError: (402, 405, 409, 418, 499),
    ServerError: (500, 502, 503, 504, 520, 524, 599),
}


def test_the_status_decides_on_the_kind_of_error():
    for cls, statuses in KINDS.items():
        for status in statuses:
            assert type(error_from_response(status, {}, b"", now=0)) is cls, status


def test_an_error_says_how_long_the_server_asks_to_wait():
    assert error_from_response(429, {}, b"", now=10).retry_after is None
    date = "Thu, 01 Jan 1970 00:01:00 GMT"
    for said, seconds in (("7", 7.0), (date, 50.0), ("soon", None)):
        error = error_from_response(429, {"Retry-After": said}, b"", now=10)
        assert error.retry_after == seconds


NO_SEGMENT = "Function 'segment' not available"


def test_an_error_with_status_200_is_an_error_too():
    for body, cls, message in (  # all but the last as Station sends them
        ({"error": "Queue is full", "status": "rejected"}, ServerError, "Queue is full"),
        ({"error": "Request timeout", "status": "timeout"}, ServerError, "Request timeout"),
        ({"error": "bad thing", "status": "error"}, ServerError, "bad thing"),
        ({"error": NO_SEGMENT}, NotFoundError, NO_SEGMENT),
        ({"error": {"message": "boom", "code": 5}}, ServerError, "boom"),
    ):
        for skill in SKILLS:
            with pytest.raises(APIStatusError) as caught:
                decode(skill, body)
            assert type(caught.value) is cls, skill
            assert (caught.value.status, caught.value.message) == (200, message)
            assert caught.value.body == body


def test_a_long_body_and_a_long_error_are_shown_in_part():
    body = b"<html>" + b"x" * 100_000
    with pytest.raises(ServerError) as caught:
        decode("caption", body)
    for error in (caught.value, error_from_response(500, {}, body, now=0)):
        assert "<html>xxx" in error.message
        assert len(error.message) < 600
        assert len(error.body) <= 500
    for shape in (b'{"error": "%b"}', b'{"detail": "%b"}', b'["%b"]', b'{"error": {"m": "%b"}}'):
        assert len(error_from_response(500, {}, shape % body, now=0).message) <= 2000


# -- anything ------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    max_leaves=5,
)
# Every key that is looked for somewhere.
keys = st.sampled_from(
    """
    caption answer objects points path bbox choices message content reasoning reasoning_details
    grounding text usage error detail type code param loc msg request_id id finish_reason metrics
    _stats stats data models status parse_error x y x_min x_max y_min y_max start_idx end_idx
    """.split()  # noqa: SIM905 - 39 quoted words are no easier to read
)
answers = st.recursive(
    json_values,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=6),
    max_leaves=20,
)


@given(skill=st.sampled_from(SKILLS), body=answers | st.binary())
@example(skill="caption", body=b"1" * 5000)
@example(skill="caption", body=b'{"caption": "\\ud800"}')
@example(skill="query", body=b'{"answer": "", "request_id": ' + b"1" * 4000 + b"}")
def test_any_body_is_a_result_or_one_of_our_errors(skill, body):
    try:
        result = decode(skill, body)
    except MoondreamError as error:
        assert isinstance(error, APIStatusError)  # noqa: PT017 - either will do
    else:
        assert isinstance(result, md.Result)


@given(
    status=st.integers(400, 599),
    headers=st.dictionaries(st.just("Retry-After"), st.text()),
    body=answers | st.binary(),
)
def test_any_response_is_an_error_with_a_message(status, headers, body):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()

    error = error_from_response(status, headers, body, now=0)

    assert error.status == status
    assert error.message
    repr(error)


@given(answers)
def test_anything_can_be_described_and_any_models_and_numbers_be_read(raw):
    message, fields = describe(raw)

    assert isinstance(message, str)
    assert fields.keys() <= {"request_id", "type", "code", "param"}
    assert all(value is None or isinstance(value, str) for value in fields.values())
    if isinstance(raw, dict):
        read_models(raw)
        assert read_stats(raw).raw == raw


def nested(depth):
    return b"[" * depth + b"]" * depth


def deepest():
    """How deep JSON can be nested and still be decoded here."""
    depth, step = 0, 1 << 16
    while step:
        try:
            msgspec.json.decode(nested(depth + step))
        except RecursionError:
            step //= 2
        else:
            depth += step
    return depth


SHAPES = [
    b"%s",
    b'{"error": %s}',
    b'{"error": {"message": %s}}',
    b'{"detail": [{"loc": [%s], "msg": %s}]}',
    b'{"caption": %s}',
    b'{"caption": "", "reasoning": {"grounding": [%s]}}',
    b'{"choices": [%s]}',
]


BODIES = {  # with so much of what is limited
    50_000: lambda most: b'{"a": [' + b"[]," * (most - 2) + b"[]]}",
    1024 * 1024: lambda most: b'{"text": "not data", "a": [' + b" " * (most - 2) + b"]}",
    100_000: lambda most: b'{"a": [' + b'"",' * (most - 2) + b'""]}',
    64: lambda most: b'{"a": ' + b"[" * (most - 1) + b"]" * (most - 1) + b"}",
}


def test_a_body_may_be_as_large_as_its_limits_and_no_larger():
    for most, body in BODIES.items():
        assert decoding.decode(body(most))
        with pytest.raises(ValueError, match=f"{most}"):
            decoding.decode(body(most + 1))


def test_nesting_is_never_too_deep_to_say_so():
    """What can just be decoded can be too deep to be shown, from a deeper place."""
    limit = deepest()
    for shape in SHAPES:
        for depth in (1, *range(max(limit - 20, 1), limit + 20)):
            body = shape.replace(b"%s", nested(depth))
            assert error_from_response(500, {}, body, now=0).message
            try:
                decode("chat", body)
            except APIStatusError as error:
                assert error.message  # noqa: PT017 - some are answers
