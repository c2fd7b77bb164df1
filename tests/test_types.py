"""The values: read by attribute or by item, never changed, checked where a caller makes them."""

import copy
import json
import pickle

import msgspec
import pytest

import moondream_async as md
from moondream_async._values import Value

REASONING = md.Reasoning("Two boats.", [md.Grounding(0, 9, [[0.25, 0.75]])])
RAW = {"caption": "a grey heron", "request_id": "42", "colour": "grey"}
CAPTION = md.CaptionResult(
    caption="a grey heron",
    request_id="42",
    finish_reason="stop",
    metrics={"output_tokens": 3},
    raw=RAW,
)
QUERY = md.QueryResult(answer="two", reasoning=REASONING, raw={"answer": "two"})

VALUES = [
    md.Point(0.25, 0.75),
    md.Region(0.1, 0.2, 0.5, 0.6),
    md.Grounding(0, 9, [[0.25, 0.75]]),
    REASONING,
    md.Result(raw={"ok": True}),
    CAPTION,
    QUERY,
    md.DetectResult(objects=(md.Region(0.1, 0.2, 0.5, 0.6),)),
    md.PointResult(points=(md.Point(0.25, 0.75),)),
    md.SegmentResult(path="M 0 0 Z", bbox=md.Region(0.1, 0.2, 0.5, 0.6)),
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
    md.RolloutOutput(points=(md.Point(0.25, 0.75),)),
    md.Rollouts(rollouts=(md.Rollout(),), rewards=(0.5,)),
    md.TrainStep(step=3, applied=True),
    md.MetricsLog(ok=True),
]
# Those that no server sends, or that hold what JSON can't tell the type of.
OURS = [
    md.BatchResult(id=7, result=CAPTION),
    md.ClientStats(**dict.fromkeys(md.ClientStats.fields(), 1)),
]
FROZEN = [
    md.CallEvent(
        call_id="1f",
        skill="caption",
        model=None,
        endpoint="http://127.0.0.1:2020/v1",
        stream=True,
        attempt=1,
        seconds=0.5,
    ),
    md.Timeout(),
    md.EncodedImage(b"\xff\xd8", "image/jpeg", 4, 3),
    md.ChunkEvent(chunk="a ", raw={"chunk": "a "}),
    md.MetricsEvent(metrics={"tokens": 3}, raw={"stats": {"tokens": 3}}),
    md.FinalEvent(raw={"completed": True}),
    md.UnknownEvent(event="mood", raw={"type": "mood"}),
    md.ReasoningEvent(text="Look.", raw={}),
    md.BboxEvent(bbox=md.Region(0.1, 0.2, 0.5, 0.6), raw={}),
    md.Hooks(),
]


def test_every_value_of_the_surface_is_among_the_examples_here():
    kinds = {
        value
        for value in vars(md).values()
        if isinstance(value, type) and issubclass(value, (msgspec.Struct, Value))
    }
    bases = {md.StreamEvent}
    made_by_callers = {md.BatchRequest, md.BulkItem, md.Frame, md.TrainGroup, md.TuningRequest}
    of_runs = {md.BulkResult, md.WatchResult}

    assert kinds - bases - made_by_callers - of_runs == {
        type(value) for value in [*VALUES, *OURS, *FROZEN]
    }


# -- results are dicts with attributes -----------------------------------------------------


@pytest.mark.parametrize("value", [*VALUES, *OURS], ids=lambda value: type(value).__name__)
def test_a_value_is_a_dict_whose_items_are_attributes_which_alone_can_change(value):
    kind, name = type(value), next(iter(type(value).fields()))
    assert value == dict(value) == {**value}
    for key, item in value.items():
        assert getattr(value, key) is item
    for key in kind.fields().keys() - value.keys() - {"raw", "headers"}:
        assert getattr(value, key) is None
    with pytest.raises(KeyError):
        value["colour"]
    with pytest.raises(AttributeError):
        value.colour  # noqa: B018 - it is looked up
    assert value.get("colour", "none") == "none"

    assert type(value | {"label": 1}) is type(value.copy()) is dict
    if value not in OURS and not isinstance(value, md.Batch):
        assert json.loads(json.dumps(value)) == value == kind(json.loads(json.dumps(value)))
    for made in (kind(**value), kind(dict(value)), kind(value.items())):
        assert made == value
        assert type(made) is kind
    with pytest.raises(TypeError, match="label"):
        kind(**value, label="dog")

    changed = kind({**value, "label": "dog"})
    assert changed["label"] == "dog"
    for refused in (name, "label"):
        with pytest.raises(AttributeError):
            setattr(changed, refused, None)
    changed[name] = "changed"
    assert getattr(changed, name) == "changed"


@pytest.mark.parametrize(
    ("kind", "args", "fields"),
    [
        (md.Region, (0.1,), {}),
        (md.Region, (0, 0, 1, 1, 1), {}),
        (md.Region, (0, 0, 1, 1), {"x_min": 0}),
        (md.Region, ({"x_min": 0, "y_min": 0, "x_max": 1},), {}),
        (md.CaptionResult, (), {}),
        (md.CaptionResult, ("a heron",), {}),
        (md.CaptionResult, (), {"caption": None}),
    ],
)
def test_a_value_without_what_it_needs_is_a_type_error(kind, args, fields):
    with pytest.raises(TypeError):
        kind(*args, **fields)


def test_what_json_has_of_a_result_becomes_typed_again_throughout():
    detected = md.DetectResult(objects=[{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 0.5}])
    asked = md.QueryResult(json.loads(json.dumps(QUERY)))

    assert detected.objects[0].x_max == detected["objects"][0]["x_max"] == 1
    assert asked.reasoning.grounding[0].points == [[0.25, 0.75]]
    assert md.DetectResult(objects=(md.Region(0, 0, 1, 1),)).objects == [md.Region(0, 0, 1, 1)]
    assert type(md.PointResult(points=()).points) is list


def test_the_body_and_the_headers_are_attributes_and_no_keys():
    result = md.CaptionResult(caption="a heron", raw=RAW, headers={"X-Server": "one"})

    assert result == {"caption": "a heron"}
    assert result.raw["colour"] == "grey"
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert (other.raw, other.headers) == (RAW, {"X-Server": "one"})


def test_the_other_values_do_not_change():
    for value in FROZEN:
        with pytest.raises(AttributeError):
            setattr(value, value.__struct_fields__[0], None)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_values_can_be_copied_and_pickled(protocol):
    for value in (*VALUES, *OURS, *FROZEN):
        pickled = pickle.loads(pickle.dumps(value, protocol))
        for other in (copy.copy(value), copy.deepcopy(value), pickled):
            assert type(other) is type(value)
            if isinstance(value, md.EncodedImage):
                assert msgspec.structs.astuple(other) == msgspec.structs.astuple(value)
            else:
                assert other == value


def test_what_the_server_left_out_is_no_key_and_none():
    result = md.CaptionResult(caption="a grey heron", request_id=None)

    assert list(result) == ["caption"]
    assert (result.request_id, result.finish_reason, result.metrics) == (None, None, None)
    assert (result.raw, result.headers) == ({}, None)
    assert md.QueryResult(answer="two").reasoning is None
    assert md.Result().raw is not md.Result().raw


def test_results_are_matched_by_their_attributes_and_as_mappings():
    match md.DetectResult(objects=[md.Region(0.1, 0.2, 0.5, 0.6)]):
        case md.DetectResult(objects=[md.Region(left, _, x_max=right)]):
            assert (left, right) == (0.1, 0.5)
    match CAPTION:
        case {"caption": text}:
            assert text == "a grey heron"


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (
            md.CaptionResult(request_id="42", caption="a heron", raw=RAW),
            "CaptionResult(caption='a heron', request_id='42')",
        ),
        (
            md.DetectResult(objects=[md.Region(0, 0.25, 1, 1)], finish_reason="stop"),
            (
                "DetectResult(objects=[Region(x_min=0, y_min=0.25, x_max=1, y_max=1)], "
                "finish_reason='stop')"
            ),
        ),
        (md.Point({"x": 0, "y": 1, "label": "eye"}), "Point(x=0, y=1, label='eye')"),
        (md.BatchOutput(index=0, url="https://secret"), "BatchOutput(index=0)"),
        (md.CheckpointDownload(url="https://secret"), "CheckpointDownload()"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_repr_shows_the_answer_first_and_neither_the_body_nor_secrets(result, shown):
    assert repr(result) == shown


# -- pictures ------------------------------------------------------------------------------


def test_prepared_picture_is_compared_by_identity_and_shown_without_its_bytes():
    image = md.EncodedImage(b"\xff\xd8" * 500, "image/jpeg", 640, 480)

    assert repr(image) == "EncodedImage(image/jpeg, 640x480, 1000 bytes)"
    assert image != md.EncodedImage(b"\xff\xd8" * 500, "image/jpeg", 640, 480)
    assert {image: 1}[image] == 1


# -- limits --------------------------------------------------------------------------------

PHASES = md.Timeout.__struct_fields__


def test_the_limits_are_those_of_the_documentation():
    assert md.Timeout() == md.Timeout(pool=30, connect=10, first_event=120, idle=60, total=None)
    assert PHASES == ("pool", "connect", "first_event", "idle", "total")


def test_a_limit_is_a_positive_number_of_seconds_or_none_and_else_refused_by_name():
    for phase in PHASES:
        for seconds in (0.001, 5, 2.5, None):
            assert getattr(md.Timeout(**{phase: seconds}), phase) == seconds
        for odd in (0, -1, 0.0, float("nan"), float("-inf"), True, False, "5", [], 1j, object()):
            with pytest.raises(md.RequestError) as caught:
                md.Timeout(**{phase: odd})
            assert caught.value.message.startswith(f"Timeout.{phase} must be a number of seconds")


# -- events --------------------------------------------------------------------------------


def test_only_the_events_that_carry_text_add_to_the_answer():
    assert md.ChunkEvent(chunk="a ", raw={}).chunk == "a "
    assert md.FinalEvent(raw={}).chunk == ""
    assert md.FinalEvent(chunk="heron", raw={}).chunk == "heron"
    assert md.UnknownEvent(event="mood", raw={}).chunk == ""
