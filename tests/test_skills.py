"""The rest of the skills, chat, and what a server tells of itself."""

import inspect
import re

import msgspec
import pytest
from canned import canned
from hypothesis import example, given
from hypothesis import strategies as st
from raw_server import whole

import moondream_async as md
from moondream_async._protocol.answers import read_result
from moondream_async._protocol.decoders import decoder_for
from moondream_async.simulator import DIALECTS

QUESTION = "Where is the red circle?"
RED_CIRCLE = (60, 180, 220, 340)  # left, top, right, bottom, as the sample was drawn
CENTRE = (140, 260)
SIZE = (640, 480)
CELL = 4  # pixels of the sample: what the simulator measures it in

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


each_dialect = pytest.mark.parametrize("dialect", DIALECTS)
each_that_outlines = pytest.mark.parametrize("dialect", ["cloud", "kestrel"])


# -- detect and point -----------------------------------------------------------------


@each_dialect
async def test_objects_are_found_in_their_places_as_many_as_are_asked_for(client, dialect, photo):
    found = []
    for skill, key, kind, kind_of_place, pixels in (
        ("detect", "objects", md.DetectResult, md.Region, RED_CIRCLE),
        ("point", "points", md.PointResult, md.Point, CENTRE),
    ):
        find = getattr(client, skill)
        result = await find(photo, "red circle")
        assert isinstance(result, kind)
        (place,) = result[key]
        assert isinstance(place, kind_of_place)
        assert place.to_pixels(*SIZE) == pytest.approx(pixels, abs=CELL)
        assert result[key] == getattr(result, key)
        assert {**place} == result.raw[key][0] == {name: getattr(place, name) for name in place}
        assert (result.request_id is not None) is (dialect in ("cloud", "kestrel"))
        assert (result.metrics is not None) is (dialect != "old")
        assert result.finish_reason == result.raw.get("finish_reason")
        assert "raw" not in repr(result)

        found.append((await find(photo, "shape"))[key])
        assert len((await find(photo, "shape", settings={"max_objects": 2}))[key]) == 2
        assert (await find(photo, "purple cat"))[key] == []
    assert len(found[0]) == 9
    for box, point in zip(*found, strict=True):
        assert box.x_min < point.x < box.x_max
        assert box.y_min < point.y < box.y_max


async def test_spatial_refs_choose_among_what_fits(client, photo):
    result = await client.point(photo, "shape", spatial_refs=[(0.22, 0.54)])
    (point,) = result.points
    assert point.to_pixels(*SIZE) == pytest.approx(CENTRE, abs=CELL)
    result = await client.segment(photo, "shape", spatial_refs=[[0.2, 0.5, 0.24, 0.58]])
    assert result.bbox.to_pixels(*SIZE) == pytest.approx(RED_CIRCLE, abs=CELL)


# -- segment --------------------------------------------------------------------------


def corners(path):
    """Return the places that a path of straight lines goes to."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@each_that_outlines
async def test_segment_outlines_an_object(client, photo):
    result = await client.segment(photo, "red circle")
    assert isinstance(result, md.SegmentResult)
    assert result["path"] == result.path == result.raw["path"]
    assert result["bbox"] == result.bbox
    assert result["bbox"]["x_min"] == result.raw["bbox"]["x_min"]
    assert result.bbox.to_pixels(*SIZE) == pytest.approx(RED_CIRCLE, abs=CELL)
    assert result.finish_reason == "stop"
    assert result.parse_error is None

    # The path is relative to the box, and the transform puts it there.
    move, scale = re.fullmatch(r"translate\((.+)\) scale\((.+)\)", result.transform).groups()
    dx, dy = map(float, move.split())
    width, height = map(float, scale.split())
    assert {limit for x, y in corners(result.path) for limit in (x, y)} >= {0, 1}
    placed = [(dx + x * width, dy + y * height) for x, y in corners(result.path)]
    for x, y in [md.Point(x, y).to_pixels(*SIZE) for x, y in placed]:  # on a circle's rim
        radius = ((x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2) ** 0.5
        assert radius == pytest.approx(80, abs=2 * CELL)


@each_that_outlines
async def test_segment_stream_draws_the_coarse_path_and_ends_with_the_refined_one(client, photo):
    plain = await client.segment(photo, "red circle")
    async with client.segment(photo, "red circle", stream=True) as stream:
        assert isinstance(stream, md.SegmentStream)
        assert (stream.bbox, stream.path) == (None, None)
        first = await anext(stream.chunk)
        assert stream.bbox == stream["bbox"] == plain.bbox
        assert stream.path is None
        coarse = await stream.text()
        assert coarse.startswith(first)
    assert stream.path == stream["path"] == plain.path
    assert stream.bbox == plain.bbox
    assert stream.finish_reason == plain.finish_reason
    assert stream.metrics.keys() == plain.metrics.keys()
    assert stream.completed
    assert stream.parse_error is stream["parse_error"] is None
    assert coarse == stream.text_so_far
    assert 3 < len(corners(coarse)) < len(corners(plain.path))


@each_that_outlines
async def test_nothing_to_outline_is_an_empty_path_without_a_box(client, photo):
    plain = await client.segment(photo, "purple cat")
    assert (plain.path, plain.bbox, plain.transform) == ("", None, None)
    async with client.segment(photo, "purple cat", stream=True) as stream:
        assert await stream.text() == ""
        assert stream.completed
        assert stream.bbox is None


# -- query: reasoning and where it looks ----------------------------------------------


@each_dialect
@streamed_or_not
async def test_reasoning_comes_with_its_places_wherever_the_server_says_it(
    client, dialect, photo, stream
):
    answer = await client.query(photo, QUESTION, reasoning=True, stream=stream)
    if stream:
        assert await answer.text() == (await client.query(photo, QUESTION)).answer
        assert answer.completed
    if dialect == "old" or (dialect == "station" and stream):  # it is lost there on the way
        assert answer.reasoning is None
        return
    reasoning = answer["reasoning"]
    assert isinstance(reasoning, md.Reasoning)
    said = [reasoning.text[each.start_idx : each.end_idx] for each in reasoning.grounding]
    (circle,) = [
        each for each, words in zip(reasoning.grounding, said, strict=True) if "red" in words
    ]
    (place,) = circle["points"]
    assert md.Point(*place).to_pixels(*SIZE) == pytest.approx(CENTRE, abs=CELL)


# -- what a server tells of itself ----------------------------------------------------


async def test_models_of_the_cloud_are_listed(client):
    models = await client.models()
    names = ["moondream3.1-9B-A2B", "moondream3-preview", "moondream-2B"]
    assert [model.id for model in models] == [model["id"] for model in models] == names
    assert models[0].name is None
    assert models[0].raw == {"id": names[0], "object": "model"}


@pytest.mark.parametrize("dialect", ["kestrel", "old"])
async def test_server_that_does_not_tell_of_itself_says_so(client):
    for call in (client.models, client.server_stats):
        with pytest.raises(md.NotFoundError):
            await call()


@each_dialect
async def test_health_is_asked_of_every_server(client):
    health = await client.health()
    assert (health.ok, health.status) == (True, "ok")
    assert health.raw["status"] == health["status"] == "ok"


async def test_health_of_a_server_without_an_address_for_it_is_its_list_of_models():
    gone = whole(b"Not Found", status="404 Not Found", kind="text/plain")
    models = {"object": "list", "data": [{"id": "m"}]}
    async with canned(gone, gone, whole(models)) as (client, server):
        assert await client.health() == md.Health(ok=True, status="ok", raw=models)
        targets = [request.target for request in server.requests]
    assert targets == ["/health", "/healthz", "/v1/models"]


async def test_health_of_a_server_in_trouble_is_an_error(simulator, client):
    simulator.faults.append("status=502")
    with pytest.raises(md.ServerError):
        await client.health()
    assert len(simulator.requests) == 1


# -- every call -----------------------------------------------------------------------

NEEDED = {
    "caption": {},
    "query": {"question": QUESTION},
    "detect": {"object": "circle"},
    "point": {"object": "circle"},
    "segment": {"object": "circle"},
}
WRONG = {  # in whatever call takes it; `test_requests.py` has many more
    "image": [7, b"", b"no picture", "nowhere.jpg", "https://example.com/heron.jpg"],
    "length": ["tiny"],
    "question": [None, " \n", 7],
    "object": [None, " \n", 7],
    "reasoning": [1],
    "spatial_refs": ["0.5", [[0.5]], [[0, 0.9, 1, 0.1]]],
    "settings": [["temperature"], {"temperature": float("nan")}, {"mine": 1j}],
    "stream": ["false"],
    "model": [" "],
}


@pytest.mark.parametrize("skill", NEEDED)
async def test_bad_call_is_refused_before_any_request(simulator, client, photo, skill):
    call = getattr(client, skill)
    names = inspect.signature(call).parameters
    bad = [{name: value} for name in names for value in WRONG.get(name, ())]
    bad.append({"image": None} | ({"spatial_refs": [[0.5, 0.5]]} if skill == "query" else {}))
    for options in bad:
        for streamed in ({"stream": False}, {"stream": True}) if "stream" in names else ({},):
            with pytest.raises(md.RequestError):
                await call(**{"image": photo, **NEEDED[skill], **streamed, **options})
    assert simulator.connections.accepted == 0


BODIES = {
    "caption": {"caption": "A heron."},
    "query": {"answer": "Two.", "reasoning": {"text": "One, two.", "mine": 1}},
    "detect": {"objects": [{"x_min": 0, "y_min": 0.25, "x_max": 0.5, "y_max": 1, "score": 0.9}]},
    "point": {"points": [{"x": 0.25, "y": 1, "label": "beak"}], "count": 1},
    "segment": {"path": "M 0 0 Z", "bbox": None, "coarse_path": "M 0 0"},
    "chat": {
        "choices": [
            {"message": {"role": "assistant", "content": "Hi.", "mood": "good"}},
            {"index": 1},
        ]
    },
}


# -- what nobody knows -----------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
# A name that no server uses: all that are known begin otherwise.
extras = st.dictionaries(st.text().map("x-{}".format), json_values, max_size=4)


@given(extra=extras, skill=st.sampled_from(sorted(BODIES)))
@example(
    extra={"org_id": "o-1", "metrics": {"mine": [1]}, "new": {"deep": [None, 1.5]}}, skill="point"
)
def test_fields_that_nobody_knows_are_kept_and_never_in_the_way(extra, skill):
    plain = read_result(skill, BODIES[skill])
    result = read_result(skill, {**BODIES[skill], **extra})
    assert result.raw == {**BODIES[skill], **extra}
    assert {key: result[key] for key in plain} == plain
    assert result.metrics == extra.get("metrics")


@given(extra=extras, kind=st.text(), skill=st.sampled_from(["caption", "query", "segment", "chat"]))
def test_events_that_nobody_knows_are_handed_on_and_never_in_the_way(extra, kind, skill):
    if skill == "chat":
        chunk = {"choices": [{"delta": {"content": "M 0", **extra}, **extra}], **extra}
    else:
        chunk = {"chunk": "M 0", "completed": False, **extra}
    unknown = {**extra, "type": f"x-{kind}"}
    decoder = decoder_for(skill)
    data = b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in (chunk, unknown))
    events = [*decoder.feed(data), *decoder.feed(b"data: [DONE]\n\n")]
    assert [event.chunk for event in events] == ["M 0", "", ""]
    assert isinstance(events[1], md.UnknownEvent)
    assert events[1].raw == unknown
    assert decoder.completed
