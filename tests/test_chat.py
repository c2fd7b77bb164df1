"""Conversations: what goes into them, and what comes out in one piece or as a stream."""

import base64
import json

import pytest
from canned import canned
from PIL import Image
from raw_server import STREAM_HEAD, in_chunks, whole

import moondream_async as md

QUESTION = "Where is the red circle?"

streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])


def as_url(photo):
    return f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"


def as_pillow(photo):
    with Image.open(photo) as image:
        image.load()
    return image


PICTURES = {
    "path": lambda photo: photo,
    "bytes": lambda photo: photo.read_bytes(),
    "bytearray": lambda photo: bytearray(photo.read_bytes()),
    "pillow": as_pillow,
}
PARTS = {
    "bare": lambda picture: picture,
    "openai": lambda picture: {"type": "image_url", "image_url": {"url": picture}},
    "short": lambda picture: {"type": "image_url", "image_url": picture},
    "image": lambda picture: {"type": "image", "image": picture},
}


@streamed_or_not
async def test_chat_gives_the_same_text_streamed_and_not(client, photo, stream):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    plain = await client.chat(messages)
    assert isinstance(plain, md.ChatResult)
    assert plain.message == md.ChatMessage(role="assistant", content=plain["message"]["content"])
    assert plain.message.content == (await client.query(photo, QUESTION)).answer
    assert plain.finish_reason == plain["finish_reason"] == "stop"
    assert plain.request_id == plain.raw["id"]
    assert (
        plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens > 729
    )
    answer = await client.chat(messages, stream=stream)
    if stream:
        assert isinstance(answer, md.ChatStream)
        pieces = [piece async for piece in answer["message"]]
        assert len(pieces) > 1
        assert "".join(pieces) == plain.message.content
        assert answer.completed
        assert answer.request_id.startswith("chatcmpl-")
    assert answer.finish_reason == plain.finish_reason
    assert answer.usage == answer["usage"] == plain.usage
    assert answer.reasoning is None


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("picture", PICTURES)
async def test_picture_goes_into_a_chat_in_any_form(simulator, client, photo, picture, part):
    part = PARTS[part](PICTURES[picture](photo))
    await client.chat([{"role": "user", "content": [part, QUESTION]}])
    sent, text = simulator.requests[0].body["messages"][0]["content"]
    assert sent["type"] == "image_url"
    assert sent["image_url"].keys() == {"url"}
    assert sent["image_url"]["url"].startswith("data:image/")
    assert text == {"type": "text", "text": QUESTION}


@pytest.mark.parametrize("part", ["openai", "short", "image"])
async def test_data_url_goes_into_a_chat_as_it_is(simulator, client, photo, part):
    part = PARTS[part](as_url(photo))
    await client.chat([{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}])
    sent, _ = simulator.requests[0].body["messages"][0]["content"]
    assert sent == {"type": "image_url", "image_url": {"url": as_url(photo)}}


async def test_prepared_picture_and_open_file_go_into_a_chat(simulator, client, photo):
    image = await client.encode_image(photo)
    with photo.open("rb") as file:
        await client.chat([{"role": "user", "content": [image, file, QUESTION]}])
    first, second, _ = simulator.requests[0].body["messages"][0]["content"]
    assert first == second


async def test_pictures_of_a_turn_keep_their_order(client, photo):
    blue = Image.new("RGB", (32, 32), "blue")
    result = await client.chat([{"role": "user", "content": ["What colour?", photo, blue]}])
    first, second = result.message.content.split("Picture 2: ")
    assert "red" in first
    assert "blue (100%)" in second


async def test_conversation_of_several_turns_arrives_as_it_is(simulator, client, photo):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [photo, "What is this?"]},
        {"role": "assistant", "content": [{"type": "text", "text": "Shapes."}]},
        {"role": "user", "content": QUESTION},
    ]
    await client.chat(messages, settings={"max_tokens": 4, "temperature": 0, "seed": 7})
    body = simulator.requests[0].body
    assert [message["role"] for message in body["messages"]] == [each["role"] for each in messages]
    assert body["messages"][0] == messages[0]
    assert body["messages"][2] == messages[2]
    assert body["messages"][3] == messages[3]
    del body["messages"]
    assert body == {
        "model": "moondream3-preview",
        "stream": False,
        "max_completion_tokens": 4,
        "temperature": 0,
        "seed": 7,
    }
    assert messages[1]["content"][0] is photo  # the caller's own list is left alone


async def test_answer_goes_back_into_the_conversation_as_it_is(simulator, client, photo):
    messages = [{"role": "user", "content": [photo, "What is this?"]}]
    first = await client.chat(messages, reasoning=True)
    await client.chat([*messages, first.message, {"role": "user", "content": QUESTION}])
    said = simulator.requests[1].body["messages"][1]
    assert said == {"role": "assistant", "content": first.message.content}


async def test_chat_asks_for_usage_in_a_stream(simulator, client):
    async with client.chat([{"role": "user", "content": "Hi"}], stream=True, model="m") as stream:
        await stream.text()
    body = simulator.requests[0].body
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert body["model"] == "m"


@streamed_or_not
async def test_chat_that_ran_out_of_tokens_says_so(client, photo, stream):
    answer = await client.chat(
        [{"role": "user", "content": [photo, QUESTION]}], settings={"max_tokens": 2}, stream=stream
    )
    if stream:
        assert len((await answer.text()).split()) == 2
    assert answer.finish_reason == "length"


@streamed_or_not
async def test_chat_thinks_where_it_is_asked_to(client, photo, stream):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    answer = await client.chat(messages, reasoning=True, stream=stream)
    text = await answer.text() if stream else answer.message.content
    assert text == (await client.chat(messages, reasoning=False)).message.content
    assert "I measure" in answer.reasoning.text
    if not stream:
        assert answer.message.reasoning == answer["message"]["reasoning"] == answer.reasoning.text


async def test_chat_stream_shows_its_thoughts_as_they_come(client, photo):
    messages = [{"role": "user", "content": [photo, QUESTION]}]
    async with client.chat(messages, reasoning=True, stream=True) as stream:
        events = [event async for event in stream.events]
    kinds = [type(event) for event in events]
    thoughts = kinds.count(md.ReasoningEvent)
    assert kinds == [
        *[md.ReasoningEvent] * thoughts,
        *[md.ChunkEvent] * (len(events) - thoughts - 2),
        md.MetricsEvent,
        md.FinalEvent,
    ]
    thought = "".join(event.text for event in events if isinstance(event, md.ReasoningEvent))
    assert thought == stream.reasoning.text
    assert "".join(event.chunk for event in events) == stream.text_so_far
    assert events[-2].metrics == dict(stream.usage)


SPAN = {"start_idx": 0, "end_idx": 3, "points": [[0.25, 0.75]]}
GROUNDING = [md.Grounding(0, 3, [[0.25, 0.75]])]
THOUGHTS = {
    "reasoning": ({"reasoning": "Two boats."}, ()),
    "reasoning_content": ({"reasoning_content": "Two boats."}, ()),
    "reasoning_details": (
        {"reasoning_details": {"text": "Two boats.", "grounding": [SPAN]}},
        GROUNDING,
    ),
    "apart": (  # the types of the official client, moondream 2.6.1
        {"reasoning": "Two boats.", "reasoning_details": {"grounding": [SPAN]}},
        GROUNDING,
    ),
    "pieces": (
        {
            "reasoning": "Two boats.",
            "reasoning_details": [
                {"type": "reasoning.text", "text": "Two "},
                {"type": "reasoning.text", "text": "boats."},
            ],
        },
        (),
    ),
}


def delta(said, **choice):
    """Return an event of a chat."""
    body = {"id": "c-1", "choices": [{"index": 0, "delta": said, **choice}]}
    return f"data: {json.dumps(body)}\n\n".encode()


@pytest.mark.parametrize("before", [(), ("Two ", "boats.")], ids=["alone", "after its pieces"])
async def test_a_whole_message_in_a_stream_is_its_text_once(before):
    body = {"choices": [{"message": {"content": "Two boats."}, "finish_reason": "stop"}]}
    events = [
        *(delta({"content": each}) for each in before),
        f"data: {json.dumps(body)}\n\n".encode(),
    ]
    async with canned(STREAM_HEAD + in_chunks(*events, b"data: [DONE]\n\n")) as (client, _):
        stream = await client.chat([{"role": "user", "content": "How many?"}], stream=True)
        assert await stream.text() == "Two boats."
    assert stream.finish_reason == "stop"


@streamed_or_not
async def test_the_servers_own_id_of_a_request_goes_before_the_messages(stream):
    said = {"id": "c-1", "request_id": 42, "choices": [{"message": {"content": "Two."}}]}
    last = {"id": "c-1", "request_id": 42, "choices": [{"delta": {}}]}
    events = [delta({"content": "Two."}), f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode()]
    answer = STREAM_HEAD + in_chunks(*events) if stream else whole(said)
    async with canned(answer) as (client, _):
        result = await client.chat([{"role": "user", "content": "How many?"}], stream=stream)
        if stream:
            assert (await result.result()).request_id == "42"
    assert result.request_id == "42"


@pytest.mark.parametrize("kind", THOUGHTS)
@streamed_or_not
async def test_thoughts_are_found_under_each_of_their_names(kind, stream):
    said, grounding = THOUGHTS[kind]
    message = {"role": "assistant", "content": "Two.", **said}
    body = {"id": "c-1", "choices": [{"message": message, "finish_reason": "stop"}]}
    events = [delta(said), delta({"content": "Two."}), delta({}, finish_reason="stop")]
    answer = STREAM_HEAD + in_chunks(*events, b"data: [DONE]\n\n") if stream else whole(body)
    async with canned(answer) as (client, _):
        result = await client.chat([{"role": "user", "content": "How many?"}], stream=stream)
        if stream:
            assert await result.text() == "Two."
        else:
            assert result.message.reasoning == "Two boats."
    assert result.reasoning == md.Reasoning("Two boats.", grounding)


@streamed_or_not
async def test_chat_that_spent_all_its_tokens_on_thinking_has_an_empty_answer(stream):
    said = {"role": "assistant", "content": None, "reasoning": "Well,"}
    body = {"choices": [{"message": said, "finish_reason": "length"}]}
    events = [delta(said), delta({}, finish_reason="length"), b"data: [DONE]\n\n"]
    answer = STREAM_HEAD + in_chunks(*events) if stream else whole(body)
    async with canned(answer) as (client, _):
        result = await client.chat([{"role": "user", "content": "Why?"}], stream=stream)
        assert (await result.text() if stream else result.message.content) == ""
    assert result.reasoning == md.Reasoning("Well,")
    assert result.finish_reason == "length"


ANSWER = [delta({"role": "assistant", "content": "Two "}), delta({"content": "boats."})]
STOP = delta({}, finish_reason="stop")
USAGE = {"prompt_tokens": 740, "completion_tokens": 2, "total_tokens": 742}
USED = f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n".encode()
DONE = b"data: [DONE]\n\n"
ENDINGS = {
    "all": [STOP, USED, DONE],
    "no usage": [STOP, DONE],
    "no finish_reason": [DONE],
    "no [DONE]": [STOP],
    "usage and no [DONE]": [STOP, USED],
    "usage with the finish_reason": [
        f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}], 'usage': USAGE})}"
        "\n\n".encode(),
        DONE,
    ],
}


@pytest.mark.parametrize("ending", ENDINGS)
async def test_chat_stream_is_complete_with_its_marker_or_its_finish_reason(ending):
    events = ENDINGS[ending]
    async with canned(STREAM_HEAD + in_chunks(*ANSWER, *events)) as (client, _):
        stream = await client.chat([{"role": "user", "content": "How many?"}], stream=True)
        assert await stream.text() == "Two boats."
    assert stream.completed
    assert stream.request_id == "c-1"
    assert stream.finish_reason == (None if ending == "no finish_reason" else "stop")
    assert stream.usage == (md.Usage(**USAGE) if "usage" in str(events) else None)


@pytest.mark.parametrize("events", [[], [USED]], ids=["at once", "after usage"])
async def test_chat_stream_that_ends_without_either_is_interrupted(events):
    async with canned(STREAM_HEAD + in_chunks(*ANSWER, *events)) as (client, _):
        stream = await client.chat([{"role": "user", "content": "How many?"}], stream=True)
        with pytest.raises(md.StreamInterruptedError) as caught:
            await stream.text()
    assert caught.value.partial == "Two boats."


BAD_MESSAGES = {
    "remote picture": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}],
        }
    ],
    "no picture": [{"role": "user", "content": [b"none"]}],
    "missing file": [{"role": "user", "content": [{"type": "image", "image": "nowhere.jpg"}]}],
    "picture from the assistant": [
        {"role": "assistant", "content": [{"type": "image", "image": b""}]},
        {"role": "user", "content": "?"},
    ],
    "unknown part": [{"role": "user", "content": [{"type": "video"}]}],
    "unknown role": [{"role": "tool", "content": "?"}],
    "no question": [{"role": "system", "content": "Be brief."}],
    "text": "How many?",
    "none": [],
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
@streamed_or_not
async def test_bad_conversation_is_refused_before_any_request(simulator, client, case, stream):
    with pytest.raises(md.RequestError):
        await client.chat(BAD_MESSAGES[case], stream=stream)
    assert simulator.connections.accepted == 0


@pytest.mark.parametrize(
    "options",
    [
        {"stream": "yes"},
        {"reasoning": 1},
        {"settings": {"max_tokens": 0}},
        {"settings": "hot"},
        {"model": ""},
    ],
    ids=repr,
)
async def test_bad_option_of_a_chat_is_refused_before_any_request(simulator, client, options):
    with pytest.raises(md.RequestError):
        await client.chat([{"role": "user", "content": "Hi"}], **options)
    assert simulator.connections.accepted == 0
