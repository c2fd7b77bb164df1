"""Scripted answers of the simulator, over real sockets: as bytes, and through the client."""

import asyncio
import base64

import pytest
import spoken
from spoken import SAMPLE

import moondream_async as md
from moondream_async.simulator import DIALECTS, SAMPLE_IMAGE, Fault, Simulator

BODY = {"image_url": SAMPLE, "question": "What is this?", "object": "shape"}
CHAT = {"messages": [{"role": "user", "content": "What is this?"}]}
TEXT = "A red circle, a blue square."
PIECES = ["A red", " circle", "."]
BOX = {"x_min": 0.1, "y_min": 0.2, "x_max": 0.5, "y_max": 0.6}

in_every_dialect = pytest.mark.parametrize("dialect", DIALECTS)
where_all_is_served = pytest.mark.parametrize("dialect", ["cloud", "kestrel"])


async def post(simulator, path, body=BODY, **more):
    return (await spoken.post(simulator, path, body | more)).json


# -- what is said --------------------------------------------------------------------------


@in_every_dialect
async def test_pieces_are_events_of_their_own_and_no_picture_is_looked_at(simulator):
    pieces = ["A r", "ed ci", "rcle", " \N{MULTIPLICATION SIGN}", "\n"]
    body = BODY | {"image_url": f"data:image/png;base64,{base64.b64encode(b'no picture').decode()}"}
    for skill, key in {"caption": "caption", "query": "answer"}.items():
        getattr(simulator.script, skill)(pieces, times=2)
        assert (await post(simulator, f"/{skill}", body))[key] == "".join(pieces)
        assert (await spoken.stream(simulator, f"/{skill}", body)).chunks == pieces


TEXTS = ["", " ", "\n", "  A\n\ncat. \n", "a\u2028b \N{PILE OF POO}", 'data: "x"\n\ndata: y']


@in_every_dialect
async def test_any_text_arrives_as_it_is(client, simulator):
    for text in TEXTS:
        simulator.script.caption(text, times=2)
        assert (await client.caption(SAMPLE_IMAGE)).caption == text
        async with client.caption(SAMPLE_IMAGE, stream=True) as answer:
            assert await answer.text() == text


HALVES = {
    "a \ud83d cat": "a \ufffd cat",
    "\udc08": "\ufffd",
    ("a \ud83d", "\udc08"): "a \N{CAT}",  # each event has half of the character
}


@in_every_dialect
async def test_half_a_character_is_sent_as_json_escapes_it(client, simulator):
    for text, expected in HALVES.items():
        simulator.script.caption(text, times=2)
        assert (await client.caption(SAMPLE_IMAGE)).caption == expected
        async with client.caption(SAMPLE_IMAGE, stream=True) as answer:
            assert await answer.text() == expected


async def test_half_a_character_may_be_in_all_that_is_scripted(client, simulator):
    half, sent = "\ud83d", "\ufffd"
    simulator.script.query(half, reasoning=half, finish_reason=half)
    simulator.script.segment(half, BOX)
    simulator.script.chat(half, reasoning=half, times=2)
    answer = await client.query(SAMPLE_IMAGE, "What is it?", reasoning=True)
    assert (answer.answer, answer.finish_reason) == (sent, sent)
    assert answer.reasoning == md.Reasoning(sent)
    assert (await client.segment(SAMPLE_IMAGE, "cat")).path == sent
    question = [{"role": "user", "content": "What is it?"}]
    assert (await client.chat(question)).message.content == sent
    async with client.chat(question, stream=True) as stream:
        assert await stream.text() == sent


@in_every_dialect
async def test_boxes_and_points_are_found_however_they_are_written(simulator):
    simulator.script.detect([md.Region(0.1, 0.2, 0.5, 0.6), (0.1, 0.2, 0.5, 0.6), BOX])
    simulator.script.point([md.Point(0.5, 0.25), (0.5, 0.25), {"y": 0.25, "x": 0.5}])
    simulator.script.point([])

    assert (await post(simulator, "/detect"))["objects"] == [BOX] * 3
    assert (await post(simulator, "/point"))["points"] == [{"x": 0.5, "y": 0.25}] * 3
    assert (await post(simulator, "/point"))["points"] == []


@where_all_is_served
async def test_outline_comes_coarse_in_a_stream_and_then_as_it_is(simulator):
    path = "M 0 0 L 1 0 L 0.5 1 Z"
    simulator.script.segment(path, BOX, coarse_path=["M 0 0", " L 1 1 Z"], times=2)
    simulator.script.segment("M 0 0 Z")

    plain = await post(simulator, "/segment")
    answer = await spoken.stream(simulator, "/segment", BODY)
    box, *_, final = answer.events
    least = await spoken.stream(simulator, "/segment", BODY)

    assert (plain["path"], plain["bbox"]) == (path, BOX)
    assert box == {"type": "bbox", "bbox": BOX}
    assert answer.chunks == ["M 0 0", " L 1 1 Z"]
    assert (final["type"], final["path"], final["bbox"]) == ("final", path, BOX)
    assert least.chunks == ["M", " 0", " 0", " Z"]
    assert (least.events[-1]["path"], least.events[-1]["bbox"]) == ("M 0 0 Z", None)


async def test_conversation_is_answered_plain_and_in_a_stream(simulator):
    said = {"reasoning": "I see it.", "finish_reason": "length"}
    simulator.script.chat(["A red", " circle."], **said, times=2)

    plain = await post(simulator, "/chat/completions", CHAT)
    streamed = await spoken.stream(simulator, "/chat/completions", CHAT)

    [choice] = plain["choices"]
    assert choice["finish_reason"] == "length"
    deltas = [event["choices"][0]["delta"] for event in streamed.events]
    assert choice["message"] == {
        "role": "assistant",
        "content": "A red circle.",
        "reasoning": "I see it.",
    }
    assert [each["content"] for each in deltas if "content" in each] == ["A red", " circle."]
    assert "".join(each.get("reasoning", "") for each in deltas) == "I see it."


GROUNDED = md.Reasoning("I see it.", (md.Grounding(2, 5, [[0.5, 0.25]]),))


@pytest.mark.parametrize("dialect", ["cloud", "kestrel", "station"])
async def test_answer_has_its_reasoning_and_tells_why_it_ended(client, simulator):
    for reasoning, read in (("I see it.", md.Reasoning("I see it.")), (GROUNDED, GROUNDED)):
        simulator.script.query("A circle.", reasoning=reasoning, finish_reason="length")
        answer = await client.query(SAMPLE_IMAGE, "What is it?", reasoning=True)
        assert (answer.answer, answer.reasoning) == ("A circle.", read)
        assert answer.finish_reason == (None if simulator.dialect.name == "station" else "length")


# -- which request gets it -----------------------------------------------------------------


async def captions(client, count):
    return [(await client.caption(SAMPLE_IMAGE, length="short")).caption for _ in range(count)]


async def test_answers_come_in_order_and_as_often_as_told_and_then_it_is_measured(
    client, simulator
):
    [measured] = await captions(client, 1)
    simulator.script.caption("one", times=2)
    simulator.script.query(TEXT)
    simulator.script.caption()
    simulator.script.caption("two")

    assert "JPEG picture" in measured
    assert await captions(client, 5) == ["one", "one", measured, "two", measured]
    assert (await client.query(SAMPLE_IMAGE, "?")).answer == TEXT


async def test_answer_for_all_requests_stands_back_and_the_latest_counts(client, simulator):
    simulator.script.caption("old", times=None)
    simulator.script.caption("new", times=None)
    simulator.script.caption("once")

    assert await captions(client, 3) == ["once", "new", "new"]


async def test_request_that_is_not_let_in_takes_no_answer():
    async with Simulator(api_key="right") as simulator:
        simulator.script.caption(TEXT)
        async with md.MoondreamClient("wrong", endpoint=simulator.endpoint) as client:
            with pytest.raises(md.AuthenticationError):
                await client.caption(SAMPLE_IMAGE)
        async with md.MoondreamClient("right", endpoint=simulator.endpoint) as client:
            assert (await client.caption(SAMPLE_IMAGE)).caption == TEXT


async def test_what_is_left_is_known_by_its_name_and_can_be_forgotten(client, simulator):
    script = simulator.script
    script.caption("taken")
    script.caption("twice", times=2)
    script.detect([(0, 0, 1, 1)], fault="status=503")
    script.query(fault="cut=2")
    script.point([], times=None)
    await captions(client, 2)

    assert [str(answer) for answer in script.unused] == [
        "caption('twice')",
        "detect([{'x_max': 1.0, 'x_min': 0.0, 'y_max': 1.0, 'y_min': 0.0}], fault='status=503')",
        "query(fault='cut=2')",
    ]
    assert repr(script).endswith("point([], times=None)])")
    assert len(script) == 4
    script.clear()
    assert (script.unused, len(script)) == ([], 0)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda script: script.segment("M 0 0 Z"), "no segment; it has caption, query, detect"),
        (lambda script: script.chat("Hello"), "no chat"),
        (lambda script: script.caption("x", times=0), "times"),
        (lambda script: script.caption("x", hold_after=-1), "hold_after"),
        (lambda script: script.caption("x", fault="cutt=1"), "unknown fault 'cutt'"),
        (lambda script: script.caption("x", fault="cut=1,times=2"), "answer's times"),
        (lambda script: script.detect([(0, 0, 1)]), "shorter"),
        (lambda script: script.point([{"x": 0, "z": 0}]), "a place has x, y, not x, z"),
    ],
    ids=["segment", "chat", "times", "hold", "fault", "fault's times", "box", "point"],
)
def test_script_that_cannot_be_played_is_refused(add, message):
    simulator = Simulator("station")
    with pytest.raises(ValueError, match=message):
        add(simulator.script)
    assert len(simulator.script) == 0


# -- what goes wrong -----------------------------------------------------------------------


async def test_fault_goes_wrong_with_its_own_answer(simulator):
    simulator.script.caption("one")
    simulator.script.caption(fault="status=503,retry_after=0")
    simulator.script.caption(fault="html=404")
    simulator.script.caption("two")

    async with md.MoondreamClient(endpoint=simulator.endpoint, max_retries=0) as client:
        assert await captions(client, 1) == ["one"]
        with pytest.raises(md.ServerError) as caught:
            await captions(client, 1)
        assert (caught.value.status, caught.value.retry_after) == (503, 0)
        with pytest.raises(md.NotFoundError):
            await captions(client, 1)
        assert await captions(client, 1) == ["two"]


@pytest.mark.parametrize(
    ("dialect", "fault"),
    [("cloud", "cut=2"), ("kestrel", "drop=2"), ("station", "error_event=2"), ("old", "cut=2")],
)
async def test_stream_breaks_after_its_scripted_pieces_and_a_plain_answer_does_not(
    client, simulator, fault
):
    simulator.script.caption(PIECES, fault=fault, times=2)

    assert await captions(client, 1) == ["A red circle."]
    async with client.caption(SAMPLE_IMAGE, stream=True) as answer:
        with pytest.raises(md.StreamError) as caught:
            await answer.text()

    assert caught.value.partial == "A red circle"


async def test_fault_of_the_simulator_leaves_the_answer_to_the_next_request(client, simulator):
    simulator.faults.append("status=503,retry_after=0")
    simulator.script.caption(TEXT)

    assert await captions(client, 1) == [TEXT]  # at the second try
    assert [request.status for request in simulator.requests] == [503, 200]


async def test_fault_of_the_simulator_comes_before_that_of_the_answer(client, simulator):
    simulator.faults.append("cut=1")
    simulator.script.caption(PIECES, fault="cut=2")

    async with client.caption(SAMPLE_IMAGE, stream=True) as answer:
        with pytest.raises(md.StreamInterruptedError) as caught:
            await answer.text()

    assert caught.value.partial == "A red"


@pytest.mark.parametrize(
    "text",
    [
        "hang_up=reset",
        "status=429,times=2,path=caption,retry_after=soon",
        "redirect=302:http://127.0.0.1/,times=always",
        "stall=3,heartbeats",
        "heartbeats=2.0,endless",
    ],
)
def test_fault_is_written_as_it_is_read(text):
    fault = Fault.parse(text)

    assert str(fault) == text
    assert Fault.parse(str(fault)) == fault


# -- what is held --------------------------------------------------------------------------


def is_held(simulator):
    return lambda: any(request.held for request in simulator.requests)


@pytest.mark.parametrize(
    ("dialect", "count"), [("cloud", 0), ("cloud", 3), ("kestrel", 3), ("station", 1), ("old", 1)]
)
async def test_stream_is_held_after_so_many_pieces_until_it_is_released(client, simulator, count):
    answer = simulator.script.caption(PIECES, hold_after=count)
    async with client.caption(SAMPLE_IMAGE, stream=True) as stream:
        read = [await anext(stream.chunk) for _ in range(count)]
        await simulator.wait_until(is_held(simulator))
        [request] = simulator.requests
        assert (read, request.events_sent) == (PIECES[:count], count)
        assert repr(request).endswith("held>")
        answer.release()
        assert await stream.text() == "".join(PIECES)
        assert not request.held


async def test_plain_answer_is_held_as_a_whole(simulator):
    for skill in ("caption", "query", "detect", "point", "segment", "chat"):
        answer = getattr(simulator.script, skill)(hold_after=1)
        path = "/chat/completions" if skill == "chat" else f"/{skill}"
        call = asyncio.create_task(post(simulator, path, BODY | CHAT))
        await simulator.wait_until(is_held(simulator))
        assert simulator.requests[-1].status is None
        answer.release()
        assert (await call)["usage" if skill == "chat" else "request_id"]


async def test_release_is_for_all_that_the_answer_holds_now_and_later(client, simulator):
    answer = simulator.script.caption(TEXT, times=3, hold_after=0)
    first = [asyncio.create_task(captions(client, 1)) for _ in range(2)]
    await simulator.wait_until(lambda: sum(each.held for each in simulator.requests) == 2)
    answer.release()

    assert [await task for task in first] == [[TEXT], [TEXT]]
    assert await captions(client, 1) == [TEXT]


async def test_client_that_leaves_a_held_stream_is_noticed(client, simulator):
    simulator.script.caption(["A red", " circle."], hold_after=1)
    async with client.caption(SAMPLE_IMAGE, stream=True) as stream:
        assert await anext(stream.chunk) == "A red"
    await simulator.wait_until(lambda: simulator.requests[0].disconnected)
    assert not simulator.requests[0].held


async def test_leaving_the_simulator_ends_what_is_held(client, simulator):
    answer = simulator.script.caption(["A red", " circle."], hold_after=1)
    async with client.caption(SAMPLE_IMAGE, stream=True) as stream:
        await anext(stream.chunk)
        await simulator.__aexit__()
        with pytest.raises(md.StreamInterruptedError):
            await stream.text()
    answer.release()  # nobody is there: nothing happens


# -- what was received ---------------------------------------------------------------------


async def test_pictures_are_received_as_the_files_that_they_are(client, simulator):
    sent = SAMPLE_IMAGE.read_bytes()
    part = {"type": "image_url", "image_url": {"url": SAMPLE}}
    about_two = [{"role": "user", "content": [part, {"type": "text", "text": "?"}, part]}]
    await client.detect(SAMPLE_IMAGE, "red")
    await client.query(None, "What can you do?")
    await client.chat(about_two)
    await client.models()

    assert [request.images for request in simulator.requests] == [[sent], [], [sent, sent], []]
