"""What the simulator answers: what it measures in pictures, and how it writes that."""

import base64
import io
import re

import pytest
from PIL import Image, ImageDraw
from spoken import SAMPLE, post
from test_simulator import CAPTION, CHAT, QUERY, ask, say, show

from moondream_async.simulator import Simulator


def data_url(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def draw(*shapes, size=(320, 240), ground="white"):
    """Draw rectangles, each a colour and a box in pixels."""
    image = Image.new("RGB", size, ground)
    for colour, box in shapes:
        ImageDraw.Draw(image).rectangle(box, fill=colour)
    return data_url(image)


# Answers come from pixels

RED_LEFT = draw(("red", (20, 80, 100, 160)))
TWO_BLUE = draw(("blue", (20, 20, 80, 80)), ("blue", (200, 120, 300, 220)), ground="black")


ANSWERS = {
    RED_LEFT: {
        "What colours are there?": r"white \(\d\d%\) and red \(\d%\)",
        "Where is the red thing?": r"A red area lies at the left",
        "Where is the blue thing?": r"No, I measure no blue area",
        "Is there a red ball?": r"Yes\. A red area",
        "Is it white?": r"Yes, white covers most",
        "How many red balls?": r"There is 1 red area",
        "How large is it?": "320\N{MULTIPLICATION SIGN}240 PNG",
        "Where is the darkest part?": r"at the (bottom )?left",
        "How bright is it?": r"bright: its mean brightness is 0\.9",
    },
    TWO_BLUE: {
        "How many blue squares?": r"There are 2 blue areas",
        "How many things?": r"There are 2 coloured areas",
        "How bright is it?": r"dark: its mean brightness is 0\.0",
        "Where is the brightest part?": r"at the \w+",
        "What color is the background?": r"black \(\d\d%\) and blue",
        "Who painted this?": r"mostly black, with blue.*no model has looked",
    },
    None: {"Why?": "^No picture came with this question"},
}


@pytest.mark.parametrize("image", ANSWERS, ids=["red at the left", "two blue", "no picture"])
async def test_answers_are_measured_in_the_picture(simulator, image):
    for question, expected in ANSWERS[image].items():
        body = {"question": question} | ({"image_url": image} if image else {})
        answer = (await post(simulator, "/query", body)).json["answer"]
        assert re.search(expected, answer), question


async def test_spatial_refs_are_looked_at():
    places = [[0.2, 0.5], [0.5, 0.4, 0.9, 0.6]]
    body = {"image_url": RED_LEFT, "question": "What colours?", "spatial_refs": places}
    answer = (await ask("/query", body)).json["answer"]
    assert answer.startswith("At (0.20, 0.50) it is red. At (0.70, 0.50) it is white.")


async def test_captions_grow_with_their_length_and_bare_base64_is_a_picture_too(simulator):
    short, normal, long, bare = [
        (await post(simulator, "/caption", body)).json["caption"]
        for body in (
            *(CAPTION | {"length": length} for length in ("short", "normal", "long")),
            {"image_url": SAMPLE.partition(",")[2]},
        )
    ]
    assert len(short) < len(normal) < len(long)
    assert normal.startswith(short)
    assert bare == normal


@pytest.mark.parametrize(
    ("kind", "size"),
    [("JPEG", (2000, 1500)), ("PNG", (1, 1)), ("GIF", (3, 700)), ("WEBP", (900, 3))],
)
async def test_any_format_and_size_is_measured(kind, size):
    image = data_url(Image.new("RGB", size, (0, 0, 255)), kind)
    answer = await ask("/caption", {"image_url": image, "length": "short"})
    size_and_kind = f"{size[0]}\N{MULTIPLICATION SIGN}{size[1]} {kind}"
    assert answer.json["caption"] == f"A dark {size_and_kind} picture, blue all over."


# Objects

SQUARES = draw(
    ("red", (32, 24, 95, 71)), ("red", (160, 120, 287, 215)), ("blue", (192, 24, 255, 71))
)
LARGE_RED = {"x_min": 0.5, "y_min": 0.5, "x_max": 0.9, "y_max": 0.9}
SMALL_RED = {"x_min": 0.1, "y_min": 0.1, "x_max": 0.3, "y_max": 0.3}
BLUE = {"x_min": 0.6, "y_min": 0.1, "x_max": 0.8, "y_max": 0.3}


def near(box):
    return pytest.approx(box, abs=0.015)


FOUND = [
    ("red square", {}, [LARGE_RED, SMALL_RED]),
    ("red square", {"settings": {"max_objects": 1}}, [LARGE_RED]),
    ("red square", {"spatial_refs": [[0.2, 0.2]]}, [SMALL_RED]),
    ("shapes", {}, [LARGE_RED, SMALL_RED, BLUE]),
    ("green square", {}, []),
    ("person", {}, []),
    ("white wall", {}, [{"x_min": 0, "y_min": 0, "x_max": 1, "y_max": 1}]),
]


async def test_detect_boxes_the_areas_of_what_is_named(simulator):
    for object, more, boxes in FOUND:
        body = {"image_url": SQUARES, "object": object, **more}
        answer = (await post(simulator, "/detect", body)).json
        assert answer["objects"] == [near(box) for box in boxes]
        assert answer.keys() == {"objects", "request_id", "finish_reason", "metrics"}


@pytest.mark.parametrize("dialect", ["cloud", "kestrel"])
async def test_segment_streams_a_box_then_a_coarse_path_then_the_refined_one(dialect):
    body = {"image_url": SAMPLE, "object": "red circle"}
    plain = (await ask("/segment", body, dialect)).json
    answer = await ask("/segment", {**body, "stream": True}, dialect)
    box, *deltas, final = answer.events
    assert box == {"type": "bbox", "bbox": plain["bbox"]}
    assert deltas == [
        {"type": "path_delta", "chunk": chunk, "completed": False, "token_index": number}
        for number, chunk in enumerate(answer.chunks)
    ]
    assert re.fullmatch("M .* Z", answer.text)
    assert len(answer.text) < len(final["path"])
    assert (final["type"], final["chunk"], final["completed"]) == ("final", "", True)
    assert (final["path"], final["bbox"]) == (plain["path"], plain["bbox"])
    assert {"request_id", "finish_reason", "metrics"} <= final.keys()


# Chat


async def test_chat_answers_the_last_question_about_the_last_picture():
    messages = [
        say("Be brief.", "system"),
        show("How many blue squares?", TWO_BLUE),
        say("There are 2.", "assistant"),
        show("Look at this.", RED_LEFT),
        say("It is red.", "assistant"),
        say("How many red squares?"),
    ]
    answer = await ask(CHAT, {"messages": messages})
    body = answer.json
    assert (answer.status, body["object"]) == (200, "chat.completion")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "There is 1 red area."},
            "finish_reason": "stop",
        }
    ]
    assert body["usage"]["completion_tokens"] == 5
    assert body["usage"]["prompt_tokens"] > 2 * 729
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 5


async def test_chat_answers_about_each_of_several_pictures():
    message = show("How many blue squares?", TWO_BLUE, RED_LEFT)
    answer = await ask(CHAT, {"messages": [message]})
    assert answer.json["choices"][0]["message"]["content"] == (
        "Picture 1: There are 2 blue areas. Picture 2: There are 0 blue areas."
    )


async def test_chat_streams_reasoning_then_the_answer_then_usage_then_done():
    body = {"messages": [show("How many red squares?", RED_LEFT)], "reasoning": True}
    plain = (await ask(CHAT, body)).json
    answer = await ask(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert answer.data.endswith(b"data: [DONE]\n\n")
    *chunks, end, usage = answer.events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0].pop("role") == "assistant"
    keys = ["".join(delta) for delta in deltas]
    assert keys == ["reasoning"] * keys.count("reasoning") + ["content"] * keys.count("content")
    message = plain["choices"][0]["message"]
    for key in ("reasoning", "content"):
        assert "".join(delta.get(key, "") for delta in deltas) == message[key]
    assert end["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert (usage["choices"], usage["usage"]) == ([], plain["usage"])
    assert {chunk["object"] for chunk in (*chunks, end, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (*chunks, end, usage)}) == 1


async def test_chat_sends_usage_in_a_stream_only_when_asked():
    body = {"messages": [say("Hello")], "stream": True, "max_completion_tokens": 2}
    events = (await ask(CHAT, body)).events
    contents = [event["choices"][0]["delta"].get("content") for event in events]
    assert contents == ["No", " picture", None]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in event for event in events)


# Tuning


async def roll_out(request, num_rollouts, **more):
    """Ask a finetune that is there for this alone."""
    async with Simulator() as simulator:
        made = await post(simulator, "/tuning/finetunes", {"name": "mine", "rank": 8})
        body = {"finetune_id": made.json["finetune_id"], "num_rollouts": num_rollouts}
        return await post(simulator, "/tuning/rollouts", {**body, "request": request, **more})


@pytest.mark.parametrize(
    ("skill", "truth"),
    [
        ("detect", {"boxes": [LARGE_RED, SMALL_RED]}),
        ("point", {"points": [{"x": 0.7, "y": 0.7}, {"x": 0.2, "y": 0.2}]}),
        ("point", {"boxes": [LARGE_RED, SMALL_RED]}),
    ],
    ids=["detect", "point", "point-in-box"],
)
async def test_rollouts_are_rewarded_by_the_ground_truth(skill, truth):
    request = {"skill": skill, "object": "red", "image_url": SQUARES}
    answer = (await roll_out(request, 16, ground_truth=truth)).json
    rewards = answer["rewards"]
    assert answer["request"] == request
    assert len(answer["rollouts"]) == len(rewards) == 16
    assert rewards[0] > 0.9
    assert rewards == sorted(rewards, reverse=True), "each is a little worse"
    assert rewards[-1] <= 0.5
    first = answer["rollouts"][0]
    assert first["output"].items() <= (await ask(f"/{skill}", request)).json.items()
    assert first.keys() >= {"skill", "finish_reason", "answer_tokens", "thinking_tokens", "coords"}


@pytest.mark.parametrize(("temperature", "kinds"), [(1.0, 3), (0, 1)])
async def test_query_rollouts_differ_unless_the_temperature_is_zero(temperature, kinds):
    request = {**QUERY, "skill": "query", "settings": {"temperature": temperature}}
    answer = (await roll_out(request, 3)).json
    assert answer["rewards"] is None
    assert len({rollout["output"]["answer"] for rollout in answer["rollouts"]}) == kinds


async def test_rollouts_of_another_skill_or_too_many_are_refused():
    for request, count in (({"skill": "caption"}, 3), ({**QUERY, "skill": "query"}, 17)):
        assert (await roll_out(request, count)).status == 400


async def test_rollouts_of_a_question_earn_nothing_by_points():
    truth = {"points": [{"x": 0, "y": 0}]}
    answer = await roll_out({**QUERY, "skill": "query"}, 2, ground_truth=truth)
    assert answer.json["rewards"] == [0, 0]
