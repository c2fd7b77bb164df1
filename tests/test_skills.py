"""The rest of the skills, chat, and what a server tells of itself."""

import inspect
import json
import re

import msgspec
import pytest
from canned import canned
from hypothesis import given
from hypothesis import strategies as st
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md
from moondream_async._protocol.answers import read_result
from moondream_async._protocol.decoders import decoder_for
from moondream_async.simulator import DIALECTS, Simulator

QUESTION = "Where is the red circle?"
RED_CIRCLE = (60, 180, 220, 340)  # left, top, right, bottom, as the sample was drawn
CENTRE = (140, 260)
SIZE = (640, 480)
CELL = 4  # pixels of the sample: what the simulator measures it in

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


@pytest.fixture(params=DIALECTS)
async def any_simulator(request):
    async with Simulator(request.param) as simulator:
        yield simulator


@pytest.fixture
async def any_client(any_simulator):
    async with md.MoondreamClient(endpoint=any_simulator.endpoint) as client:
        yield client


@pytest.fixture(params=["cloud", "kestrel"])
async def outliner(request):
    """A client of a server that outlines objects."""
    async with (
        Simulator(request.param) as simulator,
        md.MoondreamClient(endpoint=simulator.endpoint) as client,
    ):
        yield client


# -- detect and point -----------------------------------------------------------------


PLACES = {  # the key, the kinds of the result and of a place, and where the red circle is
    "detect": ("objects", md.DetectResult, md.Region, RED_CIRCLE),
    "point": ("points", md.PointResult, md.Point, CENTRE),
}
each_finder = pytest.mark.parametrize("skill", PLACES)


@each_finder
async def test_an_object_is_found_in_its_place(any_client, photo, skill):
    key, kind, kind_of_place, pixels = PLACES[skill]
    result = await getattr(any_client, skill)(photo, "red circle")
    assert isinstance(result, kind)
    (place,) = result[key]
    assert isinstance(place, kind_of_place)
    assert place.to_pixels(*SIZE) == pytest.approx(pixels, abs=CELL)
    assert result[key] == getattr(result, key)
    assert {**place} == result.raw[key][0] == {name: getattr(place, name) for name in place}


async def test_points_lie_in_the_boxes(any_client, photo):
    boxes = (await any_client.detect(photo, "shape")).objects
    points = (await any_client.point(photo, "shape")).points
    for box, point in zip(boxes, points, strict=True):
        assert box.x_min < point.x < box.x_max
        assert box.y_min < point.y < box.y_max


@each_finder
@pytest.mark.parametrize(("most", "count"), [(None, 9), (2, 2)], ids=["all", "max_objects"])
async def test_as_many_are_found_as_there_are_or_are_asked_for(
    any_client, photo, skill, most, count
):
    key, *_ = PLACES[skill]
    find = getattr(any_client, skill)
    settings = None if most is None else {"max_objects": most}
    assert len((await find(photo, "shape", settings=settings))[key]) == count
    assert (await find(photo, "purple cat", settings=settings))[key] == []


async def test_spatial_refs_choose_among_what_fits(client, photo):
    result = await client.point(photo, "shape", spatial_refs=[(0.22, 0.54)])
    (point,) = result.points
    assert point.to_pixels(*SIZE) == pytest.approx(CENTRE, abs=CELL)


async def test_places_come_with_what_the_server_says_beside(any_simulator, any_client, photo):
    for result in (
        await any_client.detect(photo, "shape"),
        await any_client.point(photo, "shape"),
    ):
        assert (result.request_id is not None) is (
            any_simulator.dialect.name in ("cloud", "kestrel")
        )
        assert (result.metrics is not None) is (any_simulator.dialect.name != "old")
        assert result.finish_reason == result.raw.get("finish_reason")
        assert "raw" not in repr(result)


# -- segment --------------------------------------------------------------------------


def corners(path):
    """Return the places that a path of straight lines goes to."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


async def test_segment_outlines_an_object(outliner, photo):
    result = await outliner.segment(photo, "red circle")
    assert isinstance(result, md.SegmentResult)
    assert result.path.startswith("M ")
    assert result["path"] == result.path == result.raw["path"]
    assert result["bbox"] == result.bbox
    assert result["bbox"]["x_min"] == result.raw["bbox"]["x_min"]
    assert result.bbox.to_pixels(*SIZE) == pytest.approx(RED_CIRCLE, abs=CELL)
    assert result.finish_reason == "stop"
    assert result.parse_error is None


async def test_path_is_relative_to_the_box_and_the_transform_puts_it_there(outliner, photo):
    result = await outliner.segment(photo, "red circle")
    move, scale = re.fullmatch(r"translate\((.+)\) scale\((.+)\)", result.transform).groups()
    dx, dy = map(float, move.split())
    width, height = map(float, scale.split())
    assert {limit for x, y in corners(result.path) for limit in (x, y)} >= {0, 1}
    placed = [(dx + x * width, dy + y * height) for x, y in corners(result.path)]
    pixels = [md.Point(x, y).to_pixels(*SIZE) for x, y in placed]
    for x, y in pixels:  # all on the rim of a circle of 80 pixels
        assert ((x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2) ** 0.5 == pytest.approx(
            80, abs=2 * CELL
        )


async def test_segment_stream_draws_the_coarse_path_and_ends_with_the_refined_one(outliner, photo):
    plain = await outliner.segment(photo, "red circle")
    async with outliner.segment(photo, "red circle", stream=True) as stream:
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


async def test_segment_stream_tells_its_events_apart(outliner, photo):
    async with outliner.segment(photo, "red circle", stream=True) as stream:
        events = [event async for event in stream.events]
    first, *between, last = events
    assert isinstance(first, md.BboxEvent)
    assert first.bbox == stream.bbox
    assert {type(event) for event in between} == {md.ChunkEvent}
    assert between[0].raw == {
        "type": "path_delta",
        "chunk": "M",
        "completed": False,
        "token_index": 0,
    }
    assert isinstance(last, md.FinalEvent)
    assert last.raw["path"] == stream.path


async def test_nothing_to_outline_is_an_empty_path_without_a_box(outliner, photo):
    plain = await outliner.segment(photo, "purple cat")
    assert (plain.path, plain.bbox, plain.transform) == ("", None, None)
    async with outliner.segment(photo, "purple cat", stream=True) as stream:
        assert await stream.text() == ""
        assert stream.completed
        assert stream.bbox is None


async def test_segment_without_a_path_but_with_a_parse_error_says_so(photo):
    body = {"path": None, "bbox": None, "parse_error": "no box", "request_id": "7"}
    async with canned(whole(body)) as (client, _):
        result = await client.segment(photo, "heron")
    assert (result.path, result.bbox, result.parse_error) == ("", None, "no box")
    assert result.raw == body


async def test_spatial_refs_say_what_to_outline(outliner, photo):
    result = await outliner.segment(photo, "shape", spatial_refs=[[0.2, 0.5, 0.24, 0.58]])
    assert result.bbox.to_pixels(*SIZE) == pytest.approx(RED_CIRCLE, abs=CELL)


# -- query: reasoning and where it looks ----------------------------------------------


@streamed_or_not
async def test_reasoning_comes_with_its_places_wherever_the_server_says_it(
    any_simulator, any_client, photo, stream
):
    answer = await any_client.query(photo, QUESTION, reasoning=True, stream=stream)
    if stream:
        assert await answer.text() == (await any_client.query(photo, QUESTION)).answer
        assert answer.completed
    name = any_simulator.dialect.name
    if name == "old" or (name == "station" and stream):  # it is lost there on the way
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


async def test_stream_has_its_reasoning_as_soon_as_the_server_has_said_it(client, photo):
    plain = await client.query(photo, QUESTION, reasoning=True)
    async with client.query(photo, QUESTION, reasoning=True, stream=True) as stream:
        await anext(stream.chunk)
        assert stream.reasoning is None
        await stream.text()
    assert stream.reasoning == stream["reasoning"] == plain.reasoning


# -- what a server tells of itself ----------------------------------------------------


async def test_models_of_the_cloud_are_listed(client):
    models = await client.models()
    assert [model.id for model in models] == [
        "moondream3.1-9B-A2B",
        "moondream3-preview",
        "moondream-2B",
    ]
    assert models[0]["id"] == "moondream3.1-9B-A2B"
    assert models[0].name is None
    assert models[0].raw == {"id": "moondream3.1-9B-A2B", "object": "model"}


@pytest.mark.parametrize("dialect", ["kestrel", "old"])
async def test_server_without_a_list_of_models_says_so(client):
    with pytest.raises(md.NotFoundError):
        await client.models()


async def test_entries_without_an_id_are_no_models():
    body = {"data": [{"name": "nameless"}, "text", {"id": ""}, {"id": "one", "mine": 1}]}
    async with canned(whole(body)) as (client, _):
        (model,) = await client.models()
    assert model == md.Model(id="one", raw={"id": "one", "mine": 1})


async def test_health_is_asked_of_every_server(any_client):
    health = await any_client.health()
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


async def test_server_stats_of_other_servers_are_not_found(client):
    with pytest.raises(md.NotFoundError):
        await client.server_stats()


# -- every call -----------------------------------------------------------------------

CALLS = {
    "caption": lambda client, photo: client.caption(photo),
    "query": lambda client, photo: client.query(photo, QUESTION),
    "detect": lambda client, photo: client.detect(photo, "circle"),
    "point": lambda client, photo: client.point(photo, "circle"),
    "segment": lambda client, photo: client.segment(photo, "circle"),
    "chat": lambda client, photo: client.chat([{"role": "user", "content": [photo, QUESTION]}]),
    "models": lambda client, photo: client.models(),
    "health": lambda client, photo: client.health(),
}
BEARERS = ("chat", "models")  # docs/openai.md of the API's documentation


@pytest.mark.parametrize("call", CALLS)
async def test_key_goes_out_in_the_header_of_the_endpoint(photo, call):
    async with (
        Simulator(api_key="a-key") as simulator,
        md.MoondreamClient("a-key", endpoint=simulator.endpoint) as client,
    ):
        await CALLS[call](client, photo)
    headers = simulator.requests[0].headers
    bearer = call in BEARERS
    assert headers.get("Authorization") == ("Bearer a-key" if bearer else None)
    assert headers.get("X-Moondream-Auth") == (None if bearer else "a-key")


@pytest.mark.parametrize("call", [call for call in CALLS if call != "health"])
async def test_wrong_key_is_refused_and_not_shown(photo, call):
    async with (
        Simulator(api_key="a-key") as simulator,
        md.MoondreamClient("sk-wrong", endpoint=simulator.endpoint) as client,
    ):
        with pytest.raises(md.AuthenticationError, match="Invalid API key") as caught:
            await CALLS[call](client, photo)
    assert "sk-wrong" not in repr(caught.value)
    assert len(simulator.requests) == 1


@pytest.mark.parametrize("call", CALLS)
async def test_closed_client_refuses_every_call(simulator, photo, call):
    client = md.MoondreamClient(endpoint=simulator.endpoint)
    await client.aclose()
    with pytest.raises(md.ClientClosedError):
        await CALLS[call](client, photo)


NEEDED = {
    "caption": {},
    "query": {"question": QUESTION},
    "detect": {"object": "circle"},
    "point": {"object": "circle"},
    "segment": {"object": "circle"},
}
NO_PICTURES = [None, 7, b"", b"no picture", "nowhere.jpg", "https://example.com/heron.jpg"]
WRONG = {  # in whatever call takes it; `test_requests.py` has many more
    "length": ["tiny"],
    "question": [None, " \n", 7],
    "object": [None, " \n", 7],
    "reasoning": [1],
    "spatial_refs": ["0.5", [[0.5]], [[0, 0.9, 1, 0.1]]],
    "settings": [["temperature"], {"temperature": float("nan")}, {"mine": 1j}],
    "stream": ["false"],
    "model": [" "],
}
BAD_CALLS = [
    *[("query", {"image": None, "spatial_refs": [[0.5, 0.5]]})],
    *[("query", {"image": image}) for image in NO_PICTURES[1:]],
    *[(skill, {"image": image}) for skill in NEEDED if skill != "query" for image in NO_PICTURES],
    *[
        (skill, {name: value})
        for skill in NEEDED
        for name in inspect.signature(getattr(md.MoondreamClient, skill)).parameters
        for value in WRONG.get(name, ())
    ],
]


@pytest.mark.parametrize(("skill", "options"), BAD_CALLS, ids=repr)
async def test_bad_call_is_refused_before_any_request(simulator, client, photo, skill, options):
    call = getattr(client, skill)
    for stream in (False, True) if "stream" in inspect.signature(call).parameters else (None,):
        streamed = {} if stream is None else {"stream": stream}
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


@pytest.mark.parametrize("skill", BODIES)
async def test_nothing_that_the_server_sent_is_lost(photo, skill):
    body = {
        **BODIES[skill],
        "org_id": "o-1",
        "metrics": {"mine": [1]},
        "new": {"deep": [None, 1.5]},
    }
    async with canned(whole(body)) as (client, _):
        result = await CALLS[skill](client, photo)
    assert result.raw == body
    assert result.metrics == {"mine": [1]}


@pytest.mark.parametrize("skill", ["caption", "query", "segment"])
async def test_nothing_that_the_server_streamed_is_lost(photo, skill):
    events = [
        {"chunk": "M 0", "completed": False, "mine": 1},
        {"type": "mood", "mood": "good"},
        {"chunk": "", "completed": True, "new": {"deep": [None, 1.5]}},
    ]
    sent = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    async with canned(STREAM_HEAD + in_chunks(*sent)) as (client, _):
        word = [] if skill == "caption" else ["heron"]
        async with getattr(client, skill)(photo, *word, stream=True) as stream:
            got = [event async for event in stream.events]
    assert [event.raw for event in got] == events
    assert [type(event) for event in got] == [md.ChunkEvent, md.UnknownEvent, md.FinalEvent]
    assert got[1].event == "mood"


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
def test_fields_that_nobody_knows_are_kept_and_never_in_the_way(extra, skill):
    plain = read_result(skill, BODIES[skill])
    result = read_result(skill, {**BODIES[skill], **extra})
    assert result.raw == {**BODIES[skill], **extra}
    fields = plain.keys()
    assert {key: result[key] for key in fields if key != "raw"} == {
        key: plain[key] for key in fields if key != "raw"
    }


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
