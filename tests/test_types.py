"""The values: read by attribute or by item, never changed, checked where a caller makes them."""

import copy
import pickle

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moondream_async as md
from moondream_async.results import (
    CaptionResult,
    ChunkEvent,
    FinalEvent,
    Grounding,
    MetricsEvent,
    Point,
    QueryResult,
    Reasoning,
    Region,
    Result,
    UnknownEvent,
)
from moondream_async.types import EncodedImage, Timeout

unhurried = settings(deadline=None)  # a busy machine is no failure

REASONING = Reasoning("Two boats.", (Grounding(0, 9, ((0.25, 0.75),)),))
RAW = {"caption": "a grey heron", "request_id": "42", "colour": "grey"}
CAPTION = CaptionResult(
    caption="a grey heron",
    request_id="42",
    finish_reason="stop",
    metrics={"output_tokens": 3},
    raw=RAW,
)
QUERY = QueryResult(answer="two", reasoning=REASONING, raw={"answer": "two"})

VALUES = [
    Point(0.25, 0.75),
    Region(0.1, 0.2, 0.5, 0.6),
    Grounding(0, 9, ((0.25, 0.75),)),
    REASONING,
    Result(raw={"ok": True}),
    CAPTION,
    QUERY,
    md.DetectResult(objects=(Region(0.1, 0.2, 0.5, 0.6),)),
    md.PointResult(points=(Point(0.25, 0.75),)),
    md.SegmentResult(path="M 0 0 Z", bbox=Region(0.1, 0.2, 0.5, 0.6)),
    md.ChatResult(message=md.ChatMessage(role="assistant", content="Two."), usage=md.Usage()),
    md.ChatMessage(role="assistant", content="Two.", reasoning="Count them."),
    md.Usage(prompt_tokens=740, completion_tokens=2, total_tokens=742),
    md.Model(id="moondream3-preview", raw={"id": "moondream3-preview"}),
    md.Health(ok=False, status="starting"),
    md.ServerStats(workers=1, default_timeout=30.0),
    md.Batch(id="b", status="completed", outputs=(md.BatchOutput(url="https://example.com"),)),
    md.BatchProgress(total=3, completed=1),
    md.BatchUsage(input_tokens=5),
    md.BatchFailure(code="timeout", message="too late"),
    md.BatchOutput(index=0, url="https://example.com"),
    md.Finetune(finetune_id="f", rank=8),
    md.Checkpoint(finetune_id="f", step=3),
    md.CheckpointDownload(url="https://example.com", expires_in=3600.0),
    md.Rollout(output=md.RolloutOutput(answer="two")),
    md.RolloutOutput(points=(Point(0.25, 0.75),)),
    md.Rollouts(rollouts=(md.Rollout(),), rewards=(0.5,)),
    md.TrainStep(step=3, applied=True),
    md.MetricsLog(ok=True),
]
# Those that no server sends, or that hold what JSON can't tell the type of.
OURS = [
    md.BatchResult(id=7, result=CAPTION),
    md.CallEvent(skill="caption", stream=True, attempt=1, seconds=0.5),
    md.ClientStats(**dict.fromkeys(md.ClientStats.__struct_fields__, 1)),
]
every_value = pytest.mark.parametrize(
    "value", [*VALUES, *OURS], ids=lambda value: type(value).__name__
)

FROZEN = [
    *VALUES,
    *OURS,
    Timeout(),
    EncodedImage(b"\xff\xd8", "image/jpeg", 4, 3),
    ChunkEvent(chunk="a ", raw={"chunk": "a "}),
    MetricsEvent(metrics={"tokens": 3}, raw={"stats": {"tokens": 3}}),
    FinalEvent(raw={"completed": True}),
    UnknownEvent(event="mood", raw={"type": "mood"}),
    md.ReasoningEvent(text="Look.", raw={}),
    md.BboxEvent(bbox=Region(0.1, 0.2, 0.5, 0.6), raw={}),
    md.Hooks(),
]
every_frozen = pytest.mark.parametrize("value", FROZEN, ids=lambda value: type(value).__name__)


def test_every_value_of_the_surface_is_among_the_examples_here():
    frozen = {
        value
        for value in vars(md).values()
        if isinstance(value, type) and issubclass(value, msgspec.Struct)
    }
    made_by_callers = {md.BatchRequest, md.TrainGroup, md.TuningRequest}

    assert frozen - {md.StreamEvent} - made_by_callers == {type(value) for value in FROZEN}


# -- results -------------------------------------------------------------------------------


def test_results_have_the_keys_of_the_official_sdk():
    assert CAPTION["caption"] == CAPTION.caption == "a grey heron"
    assert QUERY["answer"] == QUERY.answer == "two"
    assert QUERY["reasoning"]["text"] == QUERY.reasoning.text == "Two boats."
    assert QUERY["reasoning"]["grounding"][0]["points"][0] == (0.25, 0.75)


@every_value
def test_items_are_the_attributes(value):
    for name in value.__struct_fields__:
        assert value[name] is getattr(value, name)


@every_value
def test_values_become_dicts_and_keyword_arguments(value):
    fields = {name: getattr(value, name) for name in value.__struct_fields__}

    assert dict(value) == {**value} == fields
    assert list(value) == list(value.keys()) == list(fields)


@every_value
@pytest.mark.parametrize("key", ["colour", "__class__", "keys", ""])
def test_an_item_that_is_no_field_is_a_key_error(value, key):
    with pytest.raises(KeyError) as caught:
        value[key]

    assert caught.value.args == (key,)
    assert key not in value
    assert value.get(key) is None
    assert value.get(key, "none") == "none"


@every_value
def test_fields_are_in_a_value(value):
    assert all(name in value for name in value.__struct_fields__)
    assert 5 not in value


def test_get_takes_the_default_where_the_server_said_nothing():
    assert QUERY.get("answer", "?") == "two"
    assert QUERY.get("request_id", "?") == "?"
    assert QUERY.get("request_id") is None


@every_frozen
def test_values_do_not_change(value):
    name = value.__struct_fields__[0]

    with pytest.raises(AttributeError):
        setattr(value, name, None)


@every_frozen
@pytest.mark.parametrize("duplicate", [copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_values_can_be_copied_and_pickled(value, duplicate):
    other = duplicate(value)

    assert type(other) is type(value)
    assert msgspec.structs.asdict(other) == msgspec.structs.asdict(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_can_be_written_as_json(value):
    assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value


def test_what_the_server_left_out_is_none():
    result = CaptionResult(caption="a grey heron")

    assert (result.request_id, result.finish_reason, result.metrics) == (None, None, None)
    assert result.raw == {}
    assert QueryResult(answer="two").reasoning is None


def test_nothing_of_the_body_is_lost():
    assert CAPTION.raw["colour"] == "grey"


def test_results_without_a_body_do_not_share_one():
    assert Result().raw is not Result().raw


def test_repr_of_a_result_shows_what_is_known_and_not_the_body_twice():
    assert repr(CaptionResult(caption="a heron", request_id="42", raw=RAW)) == (
        "CaptionResult(request_id='42', caption='a heron')"
    )


# -- pictures ------------------------------------------------------------------------------


def test_repr_of_a_prepared_picture_holds_no_bytes_of_it():
    image = EncodedImage(b"\xff\xd8" * 500, "image/jpeg", 640, 480)

    assert repr(image) == "EncodedImage(image/jpeg, 640x480, 1000 bytes)"


def test_prepared_pictures_are_compared_by_identity_and_can_be_keys():
    image = EncodedImage(b"x", "image/png", 1, 1)

    assert image != EncodedImage(b"x", "image/png", 1, 1)
    assert {image: 1}[image] == 1


# -- limits --------------------------------------------------------------------------------

PHASES = Timeout.__struct_fields__
every_phase = pytest.mark.parametrize("phase", PHASES)


def test_the_limits_are_those_of_the_documentation():
    assert Timeout() == Timeout(pool=30, connect=10, first_event=120, idle=60, total=None)
    assert PHASES == ("pool", "connect", "first_event", "idle", "total")


@every_phase
@pytest.mark.parametrize("seconds", [0.001, 5, 2.5, float("inf"), None])
def test_a_limit_is_a_positive_number_of_seconds_or_none(phase, seconds):
    assert getattr(Timeout(**{phase: seconds}), phase) == seconds


@every_phase
@pytest.mark.parametrize(
    "seconds", [0, -1, 0.0, -0.5, float("nan"), float("-inf"), True, False, "5", [], 1j, object()]
)
def test_any_other_limit_is_refused_by_name(phase, seconds):
    with pytest.raises(md.RequestError) as caught:
        Timeout(**{phase: seconds})

    assert caught.value.message.startswith(f"Timeout.{phase} must be a positive number of seconds")


@unhurried
@given(st.floats() | st.integers() | st.text() | st.none() | st.booleans())
def test_a_limit_is_either_taken_as_it_is_or_refused(seconds):
    try:
        timeout = Timeout(idle=seconds)
    except md.RequestError:
        return
    assert timeout.idle is seconds
    assert seconds is None or seconds > 0


# -- events --------------------------------------------------------------------------------


def test_only_the_events_that_carry_text_add_to_the_answer():
    assert ChunkEvent(chunk="a ", raw={}).chunk == "a "
    assert FinalEvent(raw={}).chunk == ""
    assert FinalEvent(chunk="heron", raw={}).chunk == "heron"
    assert UnknownEvent(event="mood", raw={}).chunk == ""


def test_events_are_told_apart_by_their_type():
    match ChunkEvent(chunk="a ", raw={"chunk": "a "}):
        case ChunkEvent(chunk=text, raw=raw):
            assert (text, raw) == ("a ", {"chunk": "a "})
        case _:
            pytest.fail("a ChunkEvent is a ChunkEvent")
