"""The errors: where they stand in the tree, what they carry, and that they travel."""

import copy
import pickle

import pytest

from moondream_async import errors

STATUS = {
    "status": 429,
    "type": "rate_limit_exceeded",
    "code": "slow_down",
    "param": "image_url",
    "request_id": "2026-01-15_caption_000417",
    "retry_after": 2.5,
    "headers": {"Retry-After": "2.5"},
    "body": {"error": {"message": "too fast"}},
}
SERVER = {"partial": "a grey", "type": "overloaded", "code": "busy", "body": {"error": "busy"}}

# One of every kind, with everything that it can carry.
EXAMPLES = [
    (errors.MoondreamError, {}),
    (errors.RequestError, {}),
    (errors.ImageError, {}),
    (errors.MissingExtraError, {}),
    (errors.APIConnectionError, {"permanent": True}),
    (errors.APITimeoutError, {"phase": "first_event"}),
    *[
        (each, STATUS)
        for each in (
            errors.APIStatusError,
            errors.BadRequestError,
            errors.AuthenticationError,
            errors.PermissionDeniedError,
            errors.NotFoundError,
            errors.PayloadTooLargeError,
            errors.RateLimitError,
            errors.ServerError,
        )
    ],
    (errors.StreamError, {"partial": "a grey"}),
    (errors.StreamInterruptedError, {"partial": "a grey"}),
    (errors.StreamStalledError, {"partial": "a grey", "phase": "total"}),
    (errors.StreamProtocolError, {"partial": "a grey"}),
    (errors.StreamServerError, SERVER),
    (errors.ClientClosedError, {}),
]


def test_every_error_is_among_the_examples_here():
    found = {each for each in vars(errors).values() if isinstance(each, type)}
    assert {cls for cls, _ in EXAMPLES} == {each for each in found if issubclass(each, Exception)}


@pytest.mark.parametrize(("cls", "fields"), EXAMPLES)
def test_every_error_can_be_copied_and_pickled_whole_and_names_itself(cls, fields):
    error = cls("what happened", **fields)

    assert isinstance(error, errors.MoondreamError)
    assert {name: getattr(error, name) for name in fields} == fields
    assert repr(error) == f"{cls.__name__}('what happened')"
    pickled = [pickle.dumps(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (error, copy.copy(error), copy.deepcopy(error), *map(pickle.loads, pickled)):
        assert type(other) is cls
        assert other.message == str(other) == "what happened"
        assert vars(other) == vars(error)


def test_what_a_server_did_not_say_is_none():
    error = errors.APIStatusError("no", status=418)

    assert error.status == 418
    said = (error.type, error.code, error.param, error.request_id, error.retry_after, error.body)
    assert said == (None,) * 6


def test_nothing_had_arrived_unless_it_says_so():
    assert errors.StreamInterruptedError("ended").partial == ""
    assert errors.StreamStalledError("nothing came").phase == "idle"
