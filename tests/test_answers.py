"""Plain answers: bodies into results, and whatever a server calls an error into an error.

Where a body comes from stands beside it: `docs` is m87-labs/md-docs, `kestrel` the HTTP
server of m87-labs/kestrel and `Station` moondream-station 0.1.9, both run on loopback,
`old` is moondream 0.0.6, and `SDK` the package moondream 2.6.1.
"""

import json

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import moondream_async as md
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
from moondream_async.results import Grounding, Point, Reasoning

SKILLS = ["caption", "query", "detect", "point", "segment", "chat"]


def decode(skill, body):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return read_result(skill, decode_json(body))


# -- results -------------------------------------------------------------------------------

GROUNDED = {
    "text": "One blue boat.",
    "grounding": [{"start_idx": 4, "end_idx": 13, "points": [[0.25, 0.75]]}],
}

RESULTS = [  # what the servers document is in `test_documented.py`
    pytest.param(
        "caption",
        {"caption": "a heron", "_stats": {"tokens": 3, "duration": 0.5, "tokens_per_sec": 6.0}},
        md.CaptionResult(
            caption="a heron", metrics={"tokens": 3, "duration": 0.5, "tokens_per_sec": 6.0}
        ),
        id="caption, Station",
    ),
    pytest.param("query", {"answer": ""}, md.QueryResult(answer=""), id="query, an empty answer"),
    pytest.param("detect", {"objects": []}, md.DetectResult(objects=()), id="detect, none there"),
    pytest.param(
        "point",
        {"points": [{"x": 0.5, "y": 1}], "count": 1},
        md.PointResult(points=(Point(0.5, 1.0),)),
        id="point, Station",
    ),
    pytest.param(
        "segment",
        {"path": "M 0 0.5 L 1 1 Z", "bbox": None},
        md.SegmentResult(path="M 0 0.5 L 1 1 Z"),
        id="segment, kestrel, no box found",
    ),
    pytest.param(
        "segment",
        {"path": None, "parse_error": "odd token"},
        md.SegmentResult(path="", parse_error="odd token"),
        id="segment, kestrel, no outline",
    ),
    pytest.param(
        "chat",
        {"choices": [{"message": {"content": "Two.", "reasoning_details": GROUNDED}}]},
        md.ChatResult(
            message=md.ChatMessage(
                role="assistant",
                content="Two.",
                reasoning="One blue boat.",
                reasoning_details=Reasoning("One blue boat.", [Grounding(4, 13, [[0.25, 0.75]])]),
            ),
        ),
        id="chat, with grounding (SDK)",
    ),
]


@pytest.mark.parametrize(("skill", "body", "result"), RESULTS)
def test_every_servers_body_becomes_the_result_that_it_means(skill, body, result):
    decoded = decode(skill, body)

    assert decoded == result
    assert type(decoded) is type(result)
    assert decoded.raw == body


@pytest.mark.parametrize(
    ("value", "text"), [("2026_42", "2026_42"), (42, "42"), ("", None), (None, None), (True, None)]
)
def test_request_ids_are_strings_whatever_a_server_counts_in(value, text):
    assert decode("caption", {"caption": "", "request_id": value}).request_id == text


@pytest.mark.parametrize(
    ("value", "reasoning"),
    [
        (None, None),
        ("Count them.", Reasoning("Count them.")),
        ({"text": "Count them."}, Reasoning("Count them.")),
        ({"text": None}, Reasoning("")),
        ({"text": "x", "grounding": None}, Reasoning("x")),
        (
            {
                "text": "x",
                "grounding": [
                    {"start_idx": 0, "end_idx": 1, "points": []},
                    {"start_idx": "0", "end_idx": 1, "points": []},
                    "odd",
                    {"start_idx": 2, "end_idx": 3, "points": [[0.5]]},
                ],
            },
            Reasoning("x", (Grounding(0, 1), Grounding(2, 3, [[0.5]]))),
        ),
        (["Count", "them."], None),
        (5, None),
    ],
    ids=[
        "none",
        "a string",
        "an object",
        "no text",
        "no grounding",
        "spans that make no sense are left out",
        "a list",
        "a number",
    ],
)
def test_reasoning_comes_in_several_shapes(value, reasoning):
    assert decode_reasoning(value) == reasoning
    assert decode("query", {"answer": "two", "reasoning": value}).reasoning == reasoning


@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize(
    "body",
    [
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
    ],
)
def test_a_body_without_the_answer_is_a_server_error_that_shows_it(skill, body):
    with pytest.raises(ServerError) as caught:
        decode(skill, body)

    assert caught.value.status == 200
    assert caught.value.message.startswith("The server's reply ")


# -- models and statistics -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "models"),
    [
        pytest.param(
            {"object": "list", "data": [{"id": "moondream3-preview", "object": "model"}]},
            [("moondream3-preview", None)],
            id="cloud (seen live by others)",
        ),
        pytest.param(
            {"models": [{"id": "md2", "name": "Moondream 2", "description": "", "version": "1"}]},
            [("md2", "Moondream 2")],
            id="Station",
        ),
        pytest.param({"data": [{"id": 5}, {"id": None}, "odd", {}]}, [("5", None)], id="odd"),
        pytest.param({"data": None, "models": 5}, [], id="no list"),
        pytest.param({}, [], id="nothing"),
    ],
)
def test_models_are_listed_by_every_server(body, models):
    assert [(model.id, model.name) for model in read_models(body)] == models


def test_what_else_is_said_of_a_model_is_kept():
    [model] = read_models({"data": [{"id": "m", "owned_by": "someone"}]})

    assert model.raw["owned_by"] == "someone"


def test_stations_numbers_are_read():
    raw = {"workers": 1, "queue_size": 0, "default_timeout": 30.0, "status": "running", "new": 5}

    stats = read_stats(raw)

    assert (stats.workers, stats.default_timeout, stats.status) == (1, 30.0, "running")
    assert stats.raw == raw


def test_stations_numbers_are_kept_where_they_are_none():
    assert read_stats({"workers": "many"}).raw == {"workers": "many"}


# -- errors --------------------------------------------------------------------------------

# What servers are known to send is in `test_documented_errors.py`, and the kinds stand below.
WRONG_LENGTH = {"message": "Bad length", "type": "invalid_request", "param": "length", "code": None}
MISSING = [{"loc": ["body", "question"], "msg": "field required", "type": "x"}, {"msg": "y"}]
SHAPES = [
    (400, {"error": WRONG_LENGTH}, "Bad length", WRONG_LENGTH),
    (429, {"error": {"message": "Slow down"}, "request_id": 7}, "Slow down", {"request_id": "7"}),
    (402, {"error": "No credit"}, "No credit", {"type": None, "body": {"error": "No credit"}}),
    (422, {"detail": MISSING}, "body.question: field required; y", {}),
    (502, b"<html>\n<h1>502 Bad</h1>\n</html>", "<html> <h1>502 Bad</h1> </html>", {}),
    (403, b"error code: 1010", "error code: 1010", {"body": "error code: 1010"}),
    (413, b"", "HTTP status 413: an empty body", {}),
    (500, {"why": 5}, 'HTTP status 500: {"why": 5}', {}),
    (500, {"message": "boom"}, "boom", {}),
    (500, {"error": "Inference failed", "detail": "CUDA"}, "Inference failed: CUDA", {}),
    (500, {"error": {"type": "overloaded"}}, "overloaded", {}),
    (500, {"error": {"why": 5}}, '{"why":5}', {}),
    (500, {"error": 5}, "5", {}),
    (500, [1, 2], "[1,2]", {}),
]


@pytest.mark.parametrize(("status", "body", "message", "fields"), SHAPES)
def test_every_shape_of_an_error_is_said_in_a_line(status, body, message, fields):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    error = error_from_response(status, {}, data, now=0)

    assert (error.status, error.message) == (status, message)
    for name, value in fields.items():
        assert getattr(error, name) == value


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, md.BadRequestError),
        (401, md.AuthenticationError),
        (402, APIStatusError),
        (403, md.PermissionDeniedError),
        (404, md.NotFoundError),
        (405, APIStatusError),
        (409, APIStatusError),
        (413, md.PayloadTooLargeError),
        (418, APIStatusError),
        (422, md.BadRequestError),
        (499, APIStatusError),
        (429, md.RateLimitError),
        *[(status, ServerError) for status in (500, 502, 503, 504, 520, 524, 599)],
    ],
)
def test_the_status_decides_on_the_kind_of_error(status, cls):
    assert type(error_from_response(status, {}, b"", now=0)) is cls


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Thu, 01 Jan 1970 00:01:00 GMT"}, 50.0),
        ({"Retry-After": "soon"}, None),
    ],
)
def test_an_error_says_how_long_the_server_asks_to_wait(headers, seconds):
    assert error_from_response(429, headers, b"", now=10).retry_after == seconds


# Station sends these with status 200.
@pytest.mark.parametrize("skill", SKILLS)
@pytest.mark.parametrize(
    ("body", "cls", "message"),
    [
        ({"error": "Queue is full", "status": "rejected"}, ServerError, "Queue is full"),
        ({"error": "Request timeout", "status": "timeout"}, ServerError, "Request timeout"),
        ({"error": "bad thing", "status": "error"}, ServerError, "bad thing"),
        (
            {"error": "Function 'segment' not available"},
            NotFoundError,
            "Function 'segment' not available",
        ),
        ({"error": {"message": "boom", "code": 5}}, ServerError, "boom"),
    ],
    ids=["rejected", "timeout", "error", "not available", "an object"],
)
def test_an_error_with_status_200_is_an_error_too(skill, body, cls, message):
    with pytest.raises(APIStatusError) as caught:
        decode(skill, body)

    assert type(caught.value) is cls
    assert (caught.value.status, caught.value.message) == (200, message)
    assert caught.value.body == body


@pytest.mark.parametrize("nothing", [None, "", False, 0, {}, []])
def test_an_error_that_says_nothing_is_none(nothing):
    assert decode("caption", {"caption": "a heron", "error": nothing}).caption == "a heron"


@pytest.mark.parametrize("status", [200, 500])
def test_a_long_body_is_shown_in_part(status):
    body = b"<html>" + b"x" * 100_000

    if status == 200:
        with pytest.raises(ServerError) as caught:
            decode("caption", body)
        error = caught.value
    else:
        error = error_from_response(status, {}, body, now=0)

    assert "<html>xxx" in error.message
    assert len(error.message) < 600
    assert len(error.body) <= 500


@pytest.mark.parametrize(
    "shape", ['{"error": %s}', '{"detail": %s}', "[%s]", '{"error": {"m": %s}}']
)
def test_a_long_error_is_shown_in_part(shape):
    body = (shape % json.dumps("x" * 100_000)).encode()

    assert len(error_from_response(500, {}, body, now=0).message) <= 2000


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
def test_anything_can_be_described(raw):
    message, fields = describe(raw)

    assert isinstance(message, str)
    assert fields.keys() <= {"request_id", "type", "code", "param"}
    assert all(value is None or isinstance(value, str) for value in fields.values())


@given(answers)
def test_any_models_and_numbers_can_be_read(raw):
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


@pytest.mark.parametrize(
    "shape",
    [
        b"%s",
        b'{"error": %s}',
        b'{"error": {"message": %s}}',
        b'{"detail": [{"loc": [%s], "msg": %s}]}',
        b'{"caption": %s}',
        b'{"caption": "", "reasoning": {"grounding": [%s]}}',
        b'{"choices": [%s]}',
    ],
)
def test_nesting_is_never_too_deep_to_say_so(shape):
    """What can just be decoded can be too deep to be shown, from a deeper place."""
    limit = deepest()
    for depth in (1, *range(max(limit - 20, 1), limit + 20)):
        body = shape.replace(b"%s", nested(depth))
        assert error_from_response(500, {}, body, now=0).message
        try:
            decode("chat", body)
        except APIStatusError as error:
            assert error.message  # noqa: PT017 - some are answers
